"""dflash_scale: trains DFlash drafters for speculative decoding, online, from a fleet of vLLM servers."""

__version__ = "0.1.0"
