"""The critic: the value of every slot of a page before its item is drawn."""

import torch
from torch import Tensor, nn

from pagellm.model.backbone import Backbone
from pagellm.model.decode import slot_states

__all__ = ["Critic"]


class Critic(nn.Module):
    """V_t, the reward still to come before slot t is drawn.

    trunk  a copy of the reward model's trunk, trained further. The head starts at zero.
    """

    def __init__(self, trunk: Backbone):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.shape.n_embd, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, prompt: Tensor, valid: Tensor, item: Tensor, mask: Tensor, start: tuple | None = None
    ) -> Tensor:
        """Values (B, K) float32, 0 off the mask. Arguments as in decode.slot_states."""
        before = slot_states(self.trunk, prompt, valid, item, mask, start)[:, :-1].float()
        return torch.where(mask, self.head(before)[..., 0], 0.0)
