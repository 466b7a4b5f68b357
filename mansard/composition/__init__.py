"""Base artifact and branch on the manifest: shapes, descriptions, the artifact that both make. No torch."""
