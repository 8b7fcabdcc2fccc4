"""Output of the demo: progress, text, a table, and a JSON report."""

from __future__ import annotations

import contextlib
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

#: Version of the JSON report. It increases when a key changes its meaning or is removed.
SCHEMA = 1

_PLAIN_SECONDS = 10.0  # between two lines of progress without a terminal
_WIDTH = 92


@dataclass(frozen=True)
class TypeResult:
    """A row of the table.

    Attributes
    ----------
    bytes_per_token : float
        In the caches of all layers, including scales.
    perplexity : float
        Per byte of held-out text, through the paged cache.
    perplexity_ratio, max_logit_error : float
        Relative to ``none``.
    tokens_per_second : float
        Generated tokens of all requests together.
    text : str
        Continuation of the user's prompt.
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
        """Title of its text."""
        return f"cache type {self.cache_quant_type}"

    def cells(self) -> tuple[str, ...]:
        """Cells of its row, as text."""
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
        Keys that a query sees: ``dense``, ``window`` or ``sparse``.
    most_keys : int
        Maximum number of keys that a query sees.
    cache_format : str
    bytes_per_token : float
        In the caches of all layers: latents, and the keys of the indexer.
    perplexity : float
        Per byte of held-out text, through the paged cache.
    perplexity_ratio, rms_logit_error : float
        Relative to the first row.
    recall : float, optional
        Fraction of the keys before the window with the largest dense attention that the indexer has
        selected.
    attention_seen : float
        Fraction of the dense attention on keys that the query sees. This and the recall are means
        over layers and over queries with contexts longer than `most_keys`.
    tokens_per_second : float
        Generated tokens of all requests together.
    text : str
        Continuation of the user's prompt.
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
        """Title of its text."""
        return f"{self.keys} attention, {self.cache_format} cache"

    def cells(self) -> tuple[str, ...]:
        """Cells of its row, as text."""
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
    """The report as a dictionary of plain values.

    The key of the rows is ``cache_types`` for grouped queries and ``variants`` for latent
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
    """Writes to a stream: with rich on a terminal if it is installed, otherwise plain lines.

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
        """Bar (or lines) of a job. Call the result with (done, note)."""
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
        """Show the comparison. All rows are of one kind."""
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
    """Prints a line at the start, every few seconds, and at the end."""

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
