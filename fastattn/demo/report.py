"""Output of the demo: progress, text, a table, and the same as JSON."""

from __future__ import annotations

import contextlib
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

#: Version of the JSON report; it grows when a key changes its meaning or goes away.
SCHEMA = 1

_PLAIN_SECONDS = 10.0  # between two lines of progress without a terminal
_WIDTH = 92


@dataclass(frozen=True)
class TypeResult:
    """A row of the table.

    Attributes
    ----------
    bytes_per_token : float
        In the caches of all layers, scales included.
    perplexity : float
        A byte of held-out text, through the paged cache.
    perplexity_ratio, max_logit_error : float
        Against ``none``.
    tokens_per_second : float
        Generated, all requests together.
    text : str
        What the user's prompt was continued with.
    """

    cache_quant_type: str
    bytes_per_token: float
    perplexity: float
    perplexity_ratio: float
    max_logit_error: float
    tokens_per_second: float
    text: str

    HEADERS = (
        "cache type",
        "bytes a token",
        "perplexity",
        "against none",
        "largest logit error",
        "tokens/s",
    )

    @property
    def title(self) -> str:
        """Of its text."""
        return f"cache type {self.cache_quant_type}"

    def cells(self) -> tuple[str, ...]:
        """Of its row, as text."""
        return (
            self.cache_quant_type,
            f"{self.bytes_per_token:.0f}",
            f"{self.perplexity:.4f}",
            f"{100 * (self.perplexity_ratio - 1):+.3f} %",
            f"{self.max_logit_error:.4f}",
            f"{self.tokens_per_second:.0f}",
        )


@dataclass(frozen=True)
class LatentResult:
    """A row of the table of latent attention.

    Attributes
    ----------
    keys : str
        What a query sees: ``dense``, ``window`` or ``sparse``.
    most_keys : int
        Keys that a query sees at most.
    cache_format : str
    bytes_per_token : float
        In the caches of all layers: latents, and what the indexer keeps.
    perplexity : float
        A byte of held-out text, through the paged cache.
    perplexity_ratio, rms_logit_error : float
        Against the first row.
    recall : float, optional
        Share of the keys that the dense attention weighs most, before the window, which the indexer
        has chosen.
    attention_seen : float
        Share of the dense attention that falls on keys which the query sees. It and the recall are
        means over layers and queries of contexts longer than `most_keys`.
    tokens_per_second : float
        Generated, all requests together.
    text : str
        What the user's prompt was continued with.
    """

    keys: str
    most_keys: int
    cache_format: str
    bytes_per_token: float
    perplexity: float
    perplexity_ratio: float
    rms_logit_error: float
    recall: float | None
    attention_seen: float
    tokens_per_second: float
    text: str

    HEADERS = (
        "attention",
        "keys",
        "cache",
        "bytes a token",
        "perplexity",
        "against dense",
        "logit error",
        "recall",
        "attention seen",
        "tokens/s",
    )

    @property
    def title(self) -> str:
        """Of its text."""
        return f"{self.keys} attention, {self.cache_format} cache"

    def cells(self) -> tuple[str, ...]:
        """Of its row, as text."""
        return (
            self.keys,
            str(self.most_keys),
            self.cache_format,
            f"{self.bytes_per_token:.0f}",
            f"{self.perplexity:.4f}",
            f"{100 * (self.perplexity_ratio - 1):+.3f} %",
            f"{self.rms_logit_error:.4f}",
            "-" if self.recall is None else f"{100 * self.recall:.1f} %",
            f"{100 * self.attention_seen:.1f} %",
            f"{self.tokens_per_second:.0f}",
        )


def as_json(
    *,
    attention: str,
    versions: dict[str, str],
    device: dict[str, str],
    model: dict[str, Any],
    text: dict[str, Any],
    prompt: str,
    serving: dict[str, int],
    results: Sequence[Any],
) -> dict[str, Any]:
    """Report as a dictionary of plain values.

    The rows are under ``cache_types`` with grouped queries, under ``variants`` with latent
    attention.
    """
    rows = "cache_types" if attention == "gqa" else "variants"
    return {
        "schema": SCHEMA,
        "attention": attention,
        "versions": versions,
        "device": device,
        "model": model,
        "text": text,
        "prompt": prompt,
        "serving": serving,
        rows: [asdict(result) for result in results],
    }


class Console:
    """Writes to a stream: with rich on a terminal that has it, else plain lines.

    Parameters
    ----------
    stream : text file
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._rich: Any = None
        if stream.isatty():
            with contextlib.suppress(ImportError):
                from rich.console import Console as RichConsole

                self._rich = RichConsole(file=stream)

    def line(self, text: str = "") -> None:
        """Write a line."""
        print(text, file=self.stream, flush=True)

    def write(self, text: str) -> None:
        """Write a part of a line, and show it now."""
        print(text, file=self.stream, end="", flush=True)

    def text(self, title: str, prompt: str, continuation: str) -> None:
        """Show a generated text."""
        self.line()
        self.line(title)
        for paragraph in (prompt + continuation).split("\n"):
            indent = "    "
            self.line(
                textwrap.fill(paragraph, _WIDTH, initial_indent=indent, subsequent_indent=indent)
            )

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Bar (or lines) of a job; call the result with (done, note)."""
        if self._rich is None:
            yield _PlainProgress(self, title, total)
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<32}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._rich) as bar:
            task = bar.add_task(title, total=total, note="")

            def update(done: int, note: str = "") -> None:
                bar.update(task, completed=done, note=note)

            yield update
            bar.update(task, completed=total)

    def table(self, results: Sequence[Any]) -> None:
        """Show the comparison: rows of one kind."""
        headers = results[0].HEADERS
        rows = [result.cells() for result in results]
        self.line()
        if self._rich is not None:
            from rich.table import Table

            table = Table()
            for i, header in enumerate(headers):
                table.add_column(header, justify="left" if i == 0 else "right", no_wrap=i == 0)
            for row in rows:
                table.add_row(*row)
            self._rich.print(table)
            return
        widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
        lines: list[tuple[str, ...]] = [headers, tuple("-" * w for w in widths), *rows]
        for line in lines:
            cells = (
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))
            )
            self.line("  ".join(cells).rstrip())


class _PlainProgress:
    """A line at the start, every few seconds, and at the end."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._start = self._last = time.monotonic()
        console.line(f"{title} ...")

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if done < self._total and now - self._last < _PLAIN_SECONDS:
            return
        self._last = now
        percent = 100 * done // max(self._total, 1)
        suffix = f"  {note}" if note else ""
        self._console.line(f"{self._title}  {percent} %  {now - self._start:.1f} s{suffix}")
