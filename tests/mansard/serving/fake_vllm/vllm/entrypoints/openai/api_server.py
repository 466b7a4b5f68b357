"""A stand-in for `python -m vllm.entrypoints.openai.api_server`: the same command line and API, no model.

Answers are a deterministic function of the prompt and of `behaviour.json` in the model's folder:
  {"voice": str          what its answers start with (another voice is another fingerprint),
   "start": "die" | "hang" | null,
   "fail_completions": bool   500 for every completion but the first `fail_after`,
   "fail_after": int,
   "hang_after": int      completions after so many are never answered,
   "babble_after": int    completions after so many have another voice,
   "seconds_to_first_token": float, "seconds_per_token": float   in streams, after their head
   "start_once": str      a file: where it is there the start fails, else it is made,
   "babble_once": str     a file: where it is there the voice is another, else it is made,
   "slow_once": str       a file: where it is there the start takes `start_seconds`, else it is made,
   "start_seconds": float,
   "worker": bool         a process beside the server that is named as vLLM names its own; the server outlives it}
With --enable-lora it takes branches as vLLM with our plugin does: /v1/load_lora_adapter, the served-name header. A
branch, composed into the model's folder or in a slot, is a voice of its own. `POST /die` ends the process at once.
Standard library only.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mansard_peer import is_allowed


class Engine:
    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.behaviour = json.loads((folder / "behaviour.json").read_text())
        if (folder / "carry_on/branch.safetensors").exists():
            section = json.loads((folder / "config.json").read_text())["carry_on"]
            self.behaviour["voice"] = branch_voice(folder / "carry_on", section["alpha"])
        self.branches: dict[str, str] = {}
        self.lock = threading.Lock()
        self.running = 0
        self.completions = 0
        self.sums: Counter[str] = Counter()

    def metrics(self) -> str:
        with self.lock:
            lines = [f'{name}{{engine="0",model_name="{self.name}"}} {value}' for name, value in self.sums.items()]
            lines.append(f'vllm:num_requests_running{{engine="0"}} {self.running}.0')
            lines.append('vllm:num_requests_waiting{engine="0"} 0.0')
            lines.append(f"fake:completions {self.completions}.0")
        return "\n".join(lines) + "\n"

    def count(self, tokens: int, first_seconds: float, seconds: float) -> None:
        """A completion that ended."""
        with self.lock:
            self.sums["vllm:generation_tokens_total"] += tokens
            for name, value in (
                ("time_to_first_token_seconds", first_seconds),
                ("e2e_request_latency_seconds", seconds),
                ("request_generation_tokens", tokens),
            ):
                self.sums[f"vllm:{name}_sum"] += value
                self.sums[f"vllm:{name}_count"] += 1

    def tokens(self, prompt: str, count: int, name: str) -> list[str]:
        """`count` words that only voice, prompt and place decide."""
        voice = self.branches.get(name) or self.behaviour.get("voice", "plain")
        if self.completions > self.behaviour.get("babble_after", math.inf):
            voice = "babble"
        return [f" {voice}{hashlib.sha256(f'{voice}|{prompt}|{i}'.encode()).hexdigest()[:4]}" for i in range(count)]

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices = []
        for index, prompt in enumerate(prompts):
            made = self.tokens(str(prompt), body.get("max_tokens", 16), body["model"])
            echoed = str(prompt).split(" ") if body.get("echo") else []
            said = [*echoed, *made]
            logprobs = None
            if body.get("logprobs") is not None:
                numbers = [-0.01 * (len(t) + 1) - (int(t[-2:], 16) / 100 if t in made else 0) for t in said]
                logprobs = {
                    "tokens": said,
                    "token_logprobs": numbers,
                    "top_logprobs": [{t: n} for t, n in zip(said, numbers, strict=True)],
                    "text_offset": [0] * len(said),
                }
            choices.append({"index": index, "text": "".join(said), "logprobs": logprobs, "finish_reason": "length"})
        usage = {"prompt_tokens": 1, "completion_tokens": len(choices), "total_tokens": 1 + len(choices)}
        return {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": choices, "usage": usage}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine
    is_guarded = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def parse_request(self) -> bool:
        """As vLLM does with our middleware: nobody but its own user gets an answer."""
        if not super().parse_request():
            return False
        names = {name.lower().encode() for name in self.headers}
        if not self.is_guarded or is_allowed(self.client_address, self.connection.getsockname(), names):
            return True
        self.close_connection = True
        self.answer(401, {})
        return False

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            names = [self.engine.name, *self.engine.branches]
            card = {"object": "model", "root": str(self.engine.folder), "max_model_len": 1024}
            self.answer(200, {"object": "list", "data": [{"id": name, **card} for name in names]})
        elif self.path == "/metrics":
            self.answer(200, self.engine.metrics())
        elif self.path == "/version":
            self.answer(200, {"version": "0.0.0-fake"})
        else:
            self.answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        if self.path == "/die":
            os._exit(17)
        if self.path.endswith("_lora_adapter"):
            self.move_branch(body)
            return
        body["model"] = self.headers.get("x-mansard-served-name", body.get("model"))
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            self.answer(404, {})
            return
        if body.get("model") not in {self.engine.name, *self.engine.branches}:
            self.answer(404, {"error": {"message": f"The model {body.get('model')!r} does not exist."}})
            return
        with self.engine.lock:
            self.engine.running += 1
            self.engine.completions += 1
            number = self.engine.completions
        try:
            behaviour = self.engine.behaviour
            if number > behaviour.get("hang_after", math.inf):
                threading.Event().wait()
            if behaviour.get("fail_completions") and number > behaviour.get("fail_after", 0):
                self.answer(500, {"error": {"message": "told to fail"}})
            elif body.get("stream"):
                self.stream(body)
            elif "messages" in body:
                asked = json.dumps(body["messages"])
                text = "".join(self.engine.tokens(asked, body.get("max_tokens", 16), body["model"]))
                message = {"role": "assistant", "content": text}
                choices = [{"index": 0, "message": message, "finish_reason": "length"}]
                self.answer(200, {"id": "chat-1", "object": "chat.completion", "choices": choices})
            else:
                self.engine.count(body.get("max_tokens", 16), 0.001, 0.001)
                self.answer(200, self.engine.completion(body))
        finally:
            with self.engine.lock:
                self.engine.running -= 1

    def move_branch(self, body: dict[str, Any]) -> None:
        name, branches = body["lora_name"], self.engine.branches
        if self.path == "/v1/load_lora_adapter":
            folder = Path(body["lora_path"])
            branches[name] = branch_voice(folder, json.loads((folder / "alpha.json").read_text())["alpha"])
        else:
            branches.pop(name, None)
        self.answer(200, "Success")

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        prompt = str(body.get("prompt", body.get("messages")))
        self.wfile.flush()
        begun = time.monotonic()
        time.sleep(float(self.engine.behaviour.get("seconds_to_first_token", 0.0)))
        first = time.monotonic() - begun
        for word in self.engine.tokens(prompt, body.get("max_tokens", 16), body["model"]):
            self.chunk(f"data: {json.dumps({'choices': [{'index': 0, 'text': word}]})}\n\n")
            time.sleep(float(self.engine.behaviour.get("seconds_per_token", 0.0)))
        self.engine.count(body.get("max_tokens", 16), first, time.monotonic() - begun)
        self.chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())
        self.wfile.flush()

    def answer(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def branch_voice(folder: Path, alpha: float) -> str:
    digest = hashlib.sha256((folder / "branch.safetensors").read_bytes()).hexdigest()
    return f"branch{digest[:6]}at{alpha:.2f}"


def start_worker() -> None:
    code = (
        "import ctypes, signal; libc = ctypes.CDLL(None);"
        "libc.prctl(1, 9, 0, 0, 0); libc.prctl(15, b'VLLM::EngineCore', 0, 0, 0);"
        "print('named', flush=True); signal.pause()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.readline()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--model", "--served-model-name", "--host", "--dtype", "--max-model-len", "--tensor-parallel-size"):
        parser.add_argument(name, required=True)
    for name in ("--port", "--seed", "--shutdown-timeout"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--enforce-eager", "--no-enable-log-requests", "--disable-uvicorn-access-log", "--enable-lora"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--middleware", action="append", default=[])
    for name in ("--max-loras", "--max-cpu-loras", "--max-lora-rank", "--gpu-memory-utilization"):
        parser.add_argument(name)
    options = parser.parse_args()
    engine = Engine(options.served_model_name, Path(options.model))
    print(f"cores {os.environ.get('VLLM_CPU_OMP_THREADS_BIND')}", flush=True)
    print(f"share of the card {options.gpu_memory_utilization}", flush=True)
    if engine.behaviour.get("start") == "die":
        print("INFO loading weights", flush=True)
        raise ValueError("the head is missing from the checkpoint")
    mark = engine.behaviour.get("start_once")
    if mark is not None:
        if Path(mark).exists():
            raise ValueError("started once already")
        Path(mark).touch()
    mark = engine.behaviour.get("babble_once")
    if mark is not None:
        if Path(mark).exists():
            engine.behaviour["babble_after"] = 0
        Path(mark).touch()
    mark = engine.behaviour.get("slow_once")
    if mark is not None:
        if Path(mark).exists():
            time.sleep(float(engine.behaviour["start_seconds"]))
        Path(mark).touch()
    if engine.behaviour.get("worker"):
        start_worker()
    if engine.behaviour.get("start") == "hang":
        threading.Event().wait()
    Handler.engine = engine
    Handler.is_guarded = "mansard_peer.SameUser" in options.middleware
    server = Server((options.host, options.port), Handler)

    def end(*_: Any) -> None:
        def drain() -> None:
            deadline = time.monotonic() + options.shutdown_timeout
            while engine.running and time.monotonic() < deadline:
                time.sleep(0.02)
            os._exit(0)

        threading.Thread(target=drain, daemon=True).start()

    signal.signal(signal.SIGTERM, end)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
