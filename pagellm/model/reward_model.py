"""The reward model and the critic, which read pages with a trunk and a head.

RewardModel   a reward for every slot (token head) and one for the page (page head)
Critic        the value of every slot before its item is drawn
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagellm.model.backbone import Backbone
from pagellm.model.decode import slot_states
from pagellm.model.networks import from_state, to_state
from pagellm.stage import dist
from pagellm.stage.run import load_model_file

__all__ = ["Compare", "Critic", "RewardModel", "mean_reward"]


class Compare(nn.Module):
    """How much the item of each slot resembles the nearest one above it, by learnt measures.

    Not in the paper. Whether an item is novel or redundant depends on two items of the page. A
    small trunk judges them by relevance instead and does not learn to compare items. A measure
    is the cosine of two item rows after a linear map of its own. Of the slots above, the largest
    value counts; for the first slot it is -1.
    """

    def __init__(self, n_embd: int, measures: int = 4, features: int = 16):
        super().__init__()
        self.measures = measures
        self.project = nn.Linear(n_embd, measures * (n_embd // 2), bias=False)
        self.features = nn.Linear(measures, features)
        for one in self.project.weight.chunk(measures):
            nn.init.orthogonal_(one)
        nn.init.normal_(self.features.weight)
        nn.init.normal_(self.features.bias)

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        """(B, K, features) float32; any finite number off the mask.

        rows (B, K, C) of the items, mask (B, K) bool.
        """
        B, K, _ = rows.shape
        x = F.normalize(self.project(rows).view(B, K, self.measures, -1).transpose(1, 2), dim=-1)
        above = (
            torch.ones(K, K, dtype=torch.bool, device=rows.device).tril(-1) & mask[:, None, None, :]
        )
        nearest = torch.where(above, x @ x.transpose(2, 3), -1.0).amax(3)  # (B, measures, K)
        return F.gelu(self.features(nearest.transpose(1, 2).float()), approximate="tanh")


class RewardModel(nn.Module):
    """Token head (Eq. 6): r_t = v.h_t, where h_t is read after item t.
    Page head (Eq. 5): MLP([h_end; mean_t h_t; e_u]).

    compare  both heads also read how much the items resemble those above them (`Compare`); False:
             the paper's heads
    """

    token_mean: Tensor  # ()
    page_mean: Tensor  # ()

    def __init__(self, trunk: Backbone, compare: bool = True):
        super().__init__()
        C = trunk.shape.n_embd
        self.trunk = trunk
        self.compare = Compare(C) if compare else None
        more = 0 if self.compare is None else self.compare.features.out_features
        self.token_head = nn.Linear(C + more, 1, bias=False)
        self.page_head = nn.Sequential(
            nn.Linear(3 * C + more, C), nn.GELU(approximate="tanh"), nn.Linear(C, 1)
        )
        # Mean rewards of ground-truth pages, subtracted after training: a reward above 0 means
        # better than the average ground-truth page.
        self.register_buffer("token_mean", torch.zeros(()))
        self.register_buffer("page_mean", torch.zeros(()))
        last = self.page_head[2]
        assert isinstance(last, nn.Linear)
        for head in (self.token_head, last):
            nn.init.normal_(head.weight, std=1.0 / math.sqrt(head.in_features + 1))
        nn.init.zeros_(last.bias)

    def forward(
        self, prompt: Tensor, valid: Tensor, item: Tensor, mask: Tensor, start: tuple | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rewards of given pages.

        prompt, valid  (B, P): left-padded page prompts
        item, mask     (B, K) as in decode.Pages
        start          the prompts, read before by this trunk, as in decode.slot_states
        returns        token_reward (B, K) float32, 0 off the mask; page_reward (B,) float32
        """
        after = slot_states(self.trunk, prompt, valid, item, mask, start)[:, 1:].float()
        return self.heads(prompt, valid, item, mask, after)

    def heads(
        self, prompt: Tensor, valid: Tensor, item: Tensor, mask: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward`, given the trunk's states.

        after  (B, K, C) float32, the states after each slot's item was read
        """
        count = mask.sum(1).clamp(min=1)
        end = after[torch.arange(len(after), device=after.device), count - 1]
        if self.compare is not None:
            after = torch.cat(
                [after, self.compare(self.trunk.item_rows(item.clamp(min=0)), mask)], 2
            )
        token = torch.where(mask, self.token_head(after)[..., 0] - self.token_mean, 0.0)
        mean = torch.where(mask[..., None], after, 0.0).sum(1) / count[:, None]
        # a prompt begins with its user
        first = prompt.gather(1, (prompt.shape[1] - valid.sum(1))[:, None])
        user = self.trunk.embed(first)[:, 0].float()
        page = self.page_head(torch.cat([end, mean, user], 1))[:, 0] - self.page_mean
        return token, page

    def state(self) -> dict:
        """What `load` reads. Call it on every process."""
        heads = {name: w for name, w in dist.weights(self).items() if not name.startswith("trunk.")}
        return {**to_state(self.trunk), "heads": heads, "compare": self.compare is not None}

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "RewardModel":
        """Read model.pt from the reward stage's directory."""
        state = load_model_file(Path(path) / "model.pt")
        model = cls(from_state(state), state["compare"])
        dist.load_weights(model, {**model.state_dict(), **state["heads"]})
        return model.to(device).eval()


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


def mean_reward(token_reward: Tensor, mask: Tensor) -> Tensor:
    """Eq. 6: R_f = (1/T) sum_t r_t over each row's own slots.

    (B, K) -> (B,); 0 for an empty row.
    """
    return torch.where(mask, token_reward, 0.0).sum(1) / mask.sum(1).clamp(min=1)
