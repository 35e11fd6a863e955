"""The Markov decision process. Registers `ardrag/ARVideo-v0` with Gymnasium, without loading torch."""

from gymnasium import register, registry

if "ardrag/ARVideo-v0" not in registry:
    register(
        id="ardrag/ARVideo-v0",
        entry_point="envs.gymnasium_env:ARVideoEnv",
        vector_entry_point="envs.gymnasium_env:ARVideoVectorEnv",
    )
