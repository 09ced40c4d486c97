"""Gymnasium's plugin hook: ``CartPole1D-v0`` … ``CartPole5D-v0`` exist as soon as the package is installed."""

from gymnasium.envs.registration import register as register_id


def register() -> None:
    for dimensions in range(1, 6):
        register_id(
            id=f"CartPole{dimensions}D-v0",
            entry_point="lightning_distill.envs.cartpole:GymnasiumCartPole",
            kwargs={"dimensions": dimensions},
            max_episode_steps=500,
        )
