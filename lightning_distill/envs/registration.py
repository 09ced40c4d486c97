"""Registers ``CartPole1D-v0`` … ``CartPole5D-v0`` with Gymnasium when it is imported.

``gymnasium.make("lightning_distill.envs.registration:CartPole3D-v0")`` imports it by itself.
"""

import gymnasium

for dimensions in range(1, 6):
    gymnasium.register(
        id=f"CartPole{dimensions}D-v0",
        entry_point="lightning_distill.envs.cartpole:GymnasiumCartPole",
        kwargs={"dimensions": dimensions},
        max_episode_steps=500,
    )
