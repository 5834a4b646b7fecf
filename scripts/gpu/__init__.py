"""The stages of scripts/gpu_check.sh, which is what to call."""
