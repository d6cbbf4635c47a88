"""A reward function of one's own: `--reward_fn module:function`, called by PPO for every rollout.

# my_reward.py, in the working directory
def cheap(pages, mask, shop, users):
    price = torch.from_numpy(shop.catalogue.price).nan_to_num(0.0).to(pages.device)
    return -(price[pages.clamp(min=0)] * mask).sum(1) / mask.sum(1).clamp(min=1)

pagellm ppo --reward_fn my_reward:cheap

pages    (B, K) int64 tensor  items by number, -1 where a page is shorter
mask     (B, K) bool tensor   True on the page's own slots
shop     the prepared data: shop.catalogue.title, .price, .categories; shop.csr("train")
users    (B,) int64 tensor    whose pages they are, by number
returns  (B,) what each page earns, or (B, K) what each slot earns: a tensor or an array
"""

import hashlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Shop
from pagellm.stage.config import PageLLMError

__all__ = ["RewardFunction", "check_name"]


def check_name(name: str) -> tuple[bool, str]:
    """A rule for config.check: whether `name` names a function of a module, or is empty."""
    module, colon, function = name.partition(":")
    good = bool(colon) and function.isidentifier() and all(map(str.isidentifier, module.split(".")))
    return good or not name, "module:function, such as my_reward:cheap"


@dataclass(frozen=True)
class RewardFunction:
    """A function that pays pages.

    name    module:function
    source  the first 16 hex digits of the SHA-256 of the module's file
    """

    name: str
    source: str
    call: Callable[..., Any]

    @classmethod
    def load(cls, name: str) -> "RewardFunction":
        """Import it; the working directory is looked at first. A module is read anew each time.

        Raises PageLLMError where there is no such module or function.
        """
        module_name, _, function = name.partition(":")
        here = str(Path.cwd())
        sys.path.insert(0, here)
        try:
            importlib.invalidate_caches()
            before = sys.modules.get(module_name)
            module = importlib.reload(before) if before else importlib.import_module(module_name)
        except ImportError as error:
            raise PageLLMError(
                f"reward_fn={name!r}: module {module_name} cannot be imported ({error})\n"
                f"  It is looked for in {here}, then among the installed packages."
            ) from error
        finally:
            sys.path.remove(here)
        call = getattr(module, function, None)
        if not callable(call):
            raise PageLLMError(f"reward_fn={name!r}: {module.__file__} has no function {function}")
        code = Path(module.__file__ or "").read_bytes()
        return cls(name, hashlib.sha256(code).hexdigest()[:16], call)

    def over(self, shop: Shop) -> Callable[[Tensor, Tensor, np.ndarray], Tensor]:
        """The same for one shop: pages, mask, users -> what each slot earns."""
        return lambda pages, mask, users: self(pages, mask, shop, users)

    def __call__(self, pages: Tensor, mask: Tensor, shop: Shop, users: np.ndarray) -> Tensor:
        """What each slot earns: (B, K) float32, 0 off the mask. A page's own is on its last slot.

        pages, mask  (B, K)    users  (B,)
        Raises PageLLMError for a result of another shape, or one that is not finite.
        """
        who = torch.from_numpy(np.asarray(users, np.int64)).to(pages.device)
        with torch.no_grad():
            paid = self.call(pages, mask, shop, who)
        paid = torch.as_tensor(paid, dtype=torch.float32, device=pages.device)
        if paid.shape == mask.shape[:1]:
            slot = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            last = mask & (slot == mask.sum(1, keepdim=True))
            paid = torch.where(last, paid[:, None], 0.0)
        elif paid.shape == mask.shape:
            paid = torch.where(mask, paid, 0.0)
        else:
            raise PageLLMError(
                f"{self.name} gave {tuple(paid.shape)} for pages of {tuple(mask.shape)}: want "
                f"({len(mask)},), a number a page, or {tuple(mask.shape)}, a number a slot"
            )
        if not paid.isfinite().all():
            raise PageLLMError(f"{self.name} gave a number that is not finite")
        return paid
