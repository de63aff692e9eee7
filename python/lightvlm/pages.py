"""KVPages: keys and values of any number of caches, in pages of one storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightvlm_ext import PagePool
from lightvlm_ext._kv import PAGE_SIZES

from .cache import heads_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class KVPages:
    """Pages that the layers of any number of :class:`lightvlm.PagedCompactCache` share.

    A page holds ``page_size`` tokens of one layer and one batch row, keys and values of all heads. All pages are
    allocated here, once, and keep their addresses. A page that came free is written again in the order of the stream:
    caches that share pages run on one stream, one after the other.

    Args:
        config: the model's configuration (of the whole VLM or of its text decoder).
        pages: how many; a prompt of S tokens takes ceil(S / page_size) for each layer and batch row.
        page_size: tokens of a page, a multiple of 16 from 16 to 256. Small pages waste less in each row's last page,
            large ones need fewer entries in the block tables.
        dtype: float32, float16 or bfloat16, that of the model; None: what the configuration says, or torch's default.
        device: where the model is; None: torch's default device.

    Attributes:
        key_pages, value_pages (pages, page_size, Hkv, D): the storage.   pool: which pages are free, and how many users
        each of the others has (a lightvlm_ext.PagePool).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or outside its limits.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        pages: int,
        page_size: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be a configuration of transformers, got {type(config).__name__}")
        for name, number in (("pages", pages), ("page_size", page_size)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name} must be an int, got {type(number).__name__}")
        if pages < 1:
            raise ValueError(f"pages must be at least 1, got {pages}")
        if page_size not in PAGE_SIZES:
            low, high, step = PAGE_SIZES[0], PAGE_SIZES[-1], PAGE_SIZES.step
            raise ValueError(f"page_size must be a multiple of {step} from {low} to {high}, got {page_size}")
        text = config.get_text_config(decoder=True)
        if dtype is None:
            said = getattr(text, "dtype", None)
            dtype = said if isinstance(said, torch.dtype) else torch.get_default_dtype()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        shape = (pages, page_size, *heads_of(text))
        with torch.inference_mode(False):  # made in inference mode, they could not be written outside it
            self.key_pages = torch.zeros(shape, dtype=dtype, device=device)
            self.value_pages = torch.zeros(shape, dtype=dtype, device=device)
        self.pool = PagePool(pages)

    def __repr__(self) -> str:
        shape = tuple(self.key_pages.shape)
        return f"KVPages({shape}, {self.dtype}, {self.device}, available={self.available})"

    @property
    def pages(self) -> int:
        """How many pages there are, free or not."""
        return self.pool.pages

    @property
    def available(self) -> int:
        """How many are free."""
        return self.pool.available

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key_pages.shape[1]

    @property
    def heads(self) -> tuple[int, int]:
        """Key/value heads, and their width."""
        return self.key_pages.shape[2], self.key_pages.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self.key_pages.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.key_pages.device

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, keys and values."""
        return (self.key_pages.nbytes + self.value_pages.nbytes) // self.pages

    def blocks(self, tokens: int) -> int:
        """Pages that so many tokens of a layer and batch row take."""
        return -(-tokens // self.page_size)
