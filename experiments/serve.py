"""Serve rewards over HTTP: `python experiments/serve.py reward=aesthetic stage.port=8000`.

A run elsewhere, in another environment, asks for them with `reward=motion+remote reward.remote.url=http://host:8000`.
"""

from __future__ import annotations

from runtime.cli import main, setup_phase
from runtime.config import Plan


def run(plan: Plan) -> None:
    """Load the rewards, then answer until interrupted."""
    import uvicorn

    from rewards.base import RewardContext
    from rewards.composite import Composite
    from rewards.remote import known_clip
    from runtime.hardware import device_of
    from runtime.reward_server import application

    settings = plan.settings
    with setup_phase():
        rewards = Composite(terms=settings.reward, on_failure="drop")
        rewards.prepare(RewardContext(device_of(settings.device), settings.tracker, settings.model.folder))
        if not bool(rewards.score(*known_clip())["valid"].all()):
            raise ValueError(
                f"reward={'+'.join(settings.reward)} cannot score a known clip; the warnings above say why"
            )
        app = application(rewards)
    stage = settings.stage
    print(f"{' + '.join(settings.reward)} at http://{stage.host}:{stage.port}; health: /health; ^C ends it", flush=True)
    uvicorn.run(app, host=stage.host, port=stage.port, log_level="warning")


if __name__ == "__main__":
    main("serve", run)
