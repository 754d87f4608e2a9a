"""What `precast predict` does with speech: long sounds with their times, and subtitles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .output import bar

__all__ = ["Hearing", "subtitle_option"]

_SUFFIXES = (".srt", ".vtt", ".json")


def subtitle_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --subtitles."""
    return click.option(
        "--subtitles", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="For a sound: write what is said, with its times, to a file that ends in .srt, .vtt or .json.",
    )(command)  # fmt: skip


class Hearing:
    """Asks a pipeline, and writes subtitles of its answer to `path` where one is given.

    Raises click.UsageError for a file that cannot be written, or more than one sound.
    """

    def __init__(self, path: Path | None, force: bool, sounds: tuple[str, ...], is_quiet: bool) -> None:
        self._path, self._is_quiet = path, is_quiet
        if path is None:
            return
        if path.suffix.lower() not in _SUFFIXES:
            raise click.UsageError(f"--subtitles {path} says no format; end it in one of: {', '.join(_SUFFIXES)}.")
        if len(sounds) != 1:
            raise click.UsageError("--subtitles writes those of one sound: give it by --text, and no other.")
        if path.exists() and not force:
            raise click.UsageError(f"--subtitles {path} is there already; replace it with --force.")
        if not path.absolute().parent.is_dir():
            raise click.UsageError(f"--subtitles {path}: there is no directory {path.parent}.")

    def ask(self, pipe: Any, given: Any, asked: dict[str, Any]) -> Any:
        """The pipeline's answer; of a long sound, and for subtitles, with its times."""
        from precast.runtime.pipelines.audio import TranscriptionPipeline

        if not isinstance(pipe, TranscriptionPipeline):
            self._refuse(pipe)
            return pipe(given, **asked)
        if self._path is not None and asked.get("return_timestamps") is False:
            raise click.UsageError("--subtitles needs times; leave out --option return_timestamps=false.")
        sound = pipe.processor.open_sound(given)
        is_long = not asked.get("truncation") and len(sound) > (pipe.processor.longest or len(sound))
        times = {"return_timestamps": True} if is_long or self._path is not None else {}
        with _progress(given, is_long and not self._is_quiet) as monitor:
            answer = pipe(sound, **{**times, **monitor, **asked})
        if self._path is not None:
            self._write(self._path, answer, len(sound) / pipe.processor.rate)
        return answer

    def _refuse(self, pipe: Any) -> None:
        """Raise click.UsageError where subtitles are asked of another model than Whisper."""
        task = pipe.model.artifact.contract.task
        if self._path is None:
            return
        if task == "automatic-speech-recognition":
            raise click.UsageError(
                "--subtitles needs times, which this model, one of CTC, does not write; Whisper does."
            )
        raise click.UsageError(f"--subtitles is for models that write down speech; this one does {task}.")

    @staticmethod
    def _write(path: Path, answer: dict[str, Any], end: float) -> None:
        from precast.runtime.artifact.store import write_atomically
        from precast.runtime.errors import PublishError
        from precast.runtime.pipelines.subtitles import as_srt, as_vtt

        makers = {".srt": as_srt, ".vtt": as_vtt}
        make = makers.get(path.suffix.lower())
        text = json.dumps(answer, ensure_ascii=False, indent=2) + "\n" if make is None else make(answer["chunks"], end)
        try:
            write_atomically(path, text.encode(), 0o644)
        except OSError as error:
            raise PublishError(f"{path} cannot be written: {error.strerror}.") from error


@contextmanager
def _progress(name: str, is_shown: bool) -> Iterator[dict[str, Any]]:
    """Yield the option by which generate() moves a bar on a terminal; its frames are hundredths of a second."""
    if not is_shown:
        yield {}
        return
    with bar(f"hearing {name}") as advance:
        yield {"monitor_progress": lambda at: advance(int(at[0, 0]) // 100, int(at[0, 1]) // 100, "second")}
