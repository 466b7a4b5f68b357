"""vLLM plugin (entry point `vllm.general_plugins`): base and carry-on branch served as one model.

vLLM calls `register` in every process that it starts. The base's own model class does the base's work; a config.json
whose architecture is CarryOn... and whose `carry_on` section names the branch takes the class below it. CarryOnTaps...
gives the states of several layers away; CarryOnStates... serves users, and keeps states for the prompts that ask.
`cpu_platform` (entry point `vllm.platform_plugins`) shortens the start of an engine on a CPU.
"""

import os

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Bases whose logits are the head's product and nothing more, in vLLM and in transformers."""


def register() -> None:
    """Name the classes (nothing of vLLM's models is imported before one of them is asked for), and let models with
    slots for branches have their own manager of adapters."""
    from vllm import ModelRegistry

    from mansard_vllm.compact_logprobs import answer_compactly
    from mansard_vllm.refusals import answer_refusals
    from mansard_vllm.slots import use_branch_manager
    from mansard_vllm.told_cards import tell_cards

    use_branch_manager()
    tell_cards()
    answer_refusals()
    answer_compactly()
    for family in FAMILIES:
        for prefix in ("CarryOn", "CarryOnTaps", "CarryOnStates"):
            ModelRegistry.register_model(f"{prefix}{family}", f"mansard_vllm.models:{prefix}{family}")


def cpu_platform() -> str | None:
    """Our platform where MANSARD_ONE_IMPORT is set and vLLM would take its own plain CPU platform; else None."""
    from vllm.platforms import cpu_platform_plugin

    if os.environ.get("MANSARD_ONE_IMPORT") != "1" or cpu_platform_plugin() != "vllm.platforms.cpu.CpuPlatform":
        return None
    return "mansard_vllm.cpu_start.OneImportPlatform"
