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
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Shop
from pagellm.stage.config import PageLLMError
from pagellm.stage.hints import nearest

__all__ = ["RewardFunction", "check_name"]

CALLED_WITH = ("pages", "mask", "shop", "users")


def check_name(name: str) -> tuple[bool, str]:
    """A rule for config.check: whether `name` names a function of a module, or is empty."""
    module, colon, function = name.partition(":")
    good = bool(colon) and function.isidentifier() and all(map(str.isidentifier, module.split(".")))
    return good or not name, "module:function, such as my_reward:cheap"


OURS = str(Path(__file__).parents[1]) + os.sep  # the package
# What a function of one's own may raise. SystemExit: sys.exit there is no end of training.
RAISED = (Exception, SystemExit)


def own_lines(error: BaseException) -> str:
    """The traceback of somebody else's code: without the frames of PageLLM and of importlib.

    Of a mistake in the syntax, the place.
    """
    kept = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((OURS, "<frozen importlib"))
        and Path(frame.filename) != Path(importlib.__file__)
    ]
    lines = traceback.format_list(kept)
    if isinstance(error, SyntaxError):
        lines += traceback.format_exception_only(error)[:-1]
    return "".join(lines).rstrip("\n")


def said(error: BaseException) -> str:
    """The last line of a traceback, such as "KeyError: 'price'"."""
    return "".join(traceback.format_exception_only(error)[-1:]).strip()


def import_anew(name: str, module_name: str) -> ModuleType:
    """Import a module, or import it anew; the working directory is looked at first.

    Raises PageLLMError where there is none, or where its own code fails.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        before = sys.modules.get(module_name)
        module = importlib.reload(before) if before else importlib.import_module(module_name)
    except RAISED as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{module_name}.".startswith(f"{absent}."):
            there = [module.name for module in pkgutil.iter_modules([here])]
            close = nearest(module_name, there)
            raise PageLLMError(
                f"reward_fn={name!r}: no module {absent}"
                + (f"; did you mean {close}?" if close else "")
                + f"\n  It was looked for in {here}, then among the installed packages."
            ) from error
        raise PageLLMError(
            f"reward_fn={name!r}: {module_name} cannot be imported: {said(error)}\n"
            + own_lines(error)
        ) from error
    finally:
        sys.path.remove(here)
    if getattr(module, "__file__", None) is None:
        what = "a directory without __init__.py" if hasattr(module, "__path__") else "built in"
        raise PageLLMError(
            f"reward_fn={name!r}: {module_name} is {what}; want a module with a file"
        )
    return module


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

        Raises PageLLMError where there is no such module or function, where the module's own code
        fails, and where the function does not take four things.
        """
        module_name, _, function = name.partition(":")
        module = import_anew(name, module_name)
        call = getattr(module, function, None)
        if not callable(call):
            there = [
                key
                for key, value in vars(module).items()
                if inspect.isfunction(value) and value.__module__ == module_name
            ]
            close = nearest(function, there)
            raise PageLLMError(
                f"reward_fn={name!r}: {module.__file__} has no function {function}"
                + (f"; did you mean {close}?" if close else "")
                + (f"\n  It has {', '.join(there)}." if there else "")
            )
        try:
            inspect.signature(call).bind(*CALLED_WITH)
        except TypeError as error:
            raise PageLLMError(
                f"reward_fn={name!r} is called as {function}({', '.join(CALLED_WITH)}), but it is "
                f"{function}{inspect.signature(call)}: {error}"
            ) from error
        except ValueError:  # one written in C, whose signature Python does not know
            pass
        code = Path(module.__file__ or "").read_bytes()
        return cls(name, hashlib.sha256(code).hexdigest()[:16], call)

    def over(self, shop: Shop) -> Callable[[Tensor, Tensor, np.ndarray], Tensor]:
        """The same for one shop: pages, mask, users -> what each slot earns."""
        return lambda pages, mask, users: self(pages, mask, shop, users)

    def __call__(self, pages: Tensor, mask: Tensor, shop: Shop, users: np.ndarray) -> Tensor:
        """What each slot earns: (B, K) float32, 0 off the mask. A page's own is on its last slot.

        pages, mask  (B, K)    users  (B,)
        Raises PageLLMError where the function raises, and for a result that is no numbers, of
        another shape, or not finite.
        """
        given = pages.clone(), mask.clone()  # what it does to them in place stays its own
        who = torch.tensor(np.asarray(users, np.int64), device=pages.device)
        fed = ", ".join(
            f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            for name, x in zip(CALLED_WITH, (pages, mask, None, who), strict=True)
            if x is not None
        )
        try:
            with torch.no_grad():
                paid = self.call(*given, shop, who)
        except RAISED as error:
            raise PageLLMError(
                f"reward_fn={self.name!r} raised {said(error)}\n"
                f"  It was given {fed}, on {pages.device}.\n{own_lines(error)}"
            ) from error
        paid = self.numbers(paid, fed).to(pages.device)
        wanted = f"want ({len(mask)},), a number a page, or {tuple(mask.shape)}, a number a slot"
        if paid.shape == mask.shape[:1]:
            slot = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            last = mask & (slot == mask.sum(1, keepdim=True))
            slots = torch.where(last, paid[:, None], 0.0)
        elif paid.shape == mask.shape:
            slots = torch.where(mask, paid, 0.0)
        else:
            raise PageLLMError(
                f"reward_fn={self.name!r} gave {tuple(paid.shape)} for pages of "
                f"{tuple(mask.shape)}: {wanted}"
            )
        if not slots.isfinite().all():
            wrong = ~slots.isfinite().all(1)
            row = int(wrong.nonzero()[0])
            k = int((~slots[row].isfinite()).nonzero()[0])
            raise PageLLMError(
                f"reward_fn={self.name!r} gave a number that is not finite for {int(wrong.sum())} "
                f"of {len(mask)} pages\n  The first is {slots[row, k].item()} for pages[{row}]"
                + (f", slot {k}" if paid.ndim == 2 else "")
                + f": user {int(who[row])}, items {pages[row][mask[row]].tolist()}."
            )
        return slots

    def numbers(self, paid: Any, fed: str) -> Tensor:
        """What the function gave as a float32 tensor.

        fed  what it was given, in words
        Raises PageLLMError if that is not real numbers.
        """
        try:
            numbers = torch.as_tensor(paid).detach()
            if numbers.is_complex():
                raise TypeError("complex numbers")
            return numbers.float()
        except (TypeError, ValueError, RuntimeError) as error:
            what = type(paid).__name__
            dtype = getattr(paid, "dtype", None)
            raise PageLLMError(
                f"reward_fn={self.name!r} gave {what if dtype is None else f'{what} of {dtype}'}: "
                f"want a tensor or an array of real numbers\n  It was given {fed}."
            ) from error
