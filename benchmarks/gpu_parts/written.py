"""The page of `gpu.py`: docs/benchmarks/gpu.md from docs/benchmarks/gpu.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from .items import Answer, Part
from .ledger import PEERS

Session = Mapping[str, Any]


def page(sessions: Sequence[Session], parts: Mapping[str, Part]) -> str:
    """The whole page: for each GPU every part, from the latest session with results of it."""
    blocks = ["# On a GPU", "Written by `make gpu` ([how](../gpu.md)); every number is in the JSON beside this page."]
    for gpu in dict.fromkeys(session["machine"]["gpu"] for session in sessions):
        of_gpu = [session for session in sessions if session["machine"]["gpu"] == gpu]
        blocks.append(f"## {gpu}")
        for name, part in parts.items():
            with_it = [session for session in of_gpu if _done(session, name)]
            blocks += [f"### {part.title}", part.question]
            blocks += section(with_it[-1], name, part) if with_it else ["Not measured yet."]
    return "\n\n".join(blocks) + "\n"


def section(session: Session, name: str, part: Part) -> list[str]:
    """The results of a session for a part."""
    answers = _done(session, name)
    blocks = [f"{machine_summary(session['machine'])}; begun {session['began']}."]
    missing = {answer["missing"]: None for answer in answers.values() if "missing" in answer}
    blocks += [f"{package} was not installed there." for package in missing]
    there = {item: answer for item, answer in answers.items() if "missing" not in answer}
    failed = {item: answer for item, answer in there.items() if "error" in answer}
    blocks += [_failed(item, answer) for item, answer in failed.items()]
    if whole := {item: answer for item, answer in there.items() if item not in failed}:
        blocks.append(part.write(whole))
    left = [item.name for item in part.items if item.name not in answers]
    return [*blocks, f"Not measured yet: {', '.join(left)}."] if left else blocks


def machine_summary(machine: Mapping[str, Any]) -> str:
    """GPU, libraries and code as one line."""
    git = machine["git"]
    code = f"commit {git['commit'][:12]}{', changed' if git['dirty'] else ''}" if git else "no commit"
    peers = ", ".join(f"{name} {machine[name]}" for name in PEERS if machine[name])
    return (
        f"{machine['gpu']} ({machine['gpu_memory_gib']} GiB), driver {machine['driver']}, CUDA {machine['cuda']}, "
        f"cuDNN {machine['cudnn']}, NCCL {machine['nccl']}, torch {machine['torch']}, {machine['cores']} cores of "
        f"{machine['cpu']}, gengap_dist {machine['gengap_dist']} ({code}, sources {machine['sources']})"
        + (f", {peers}" if peers else "")
    )


def _done(session: Session, part: str) -> dict[str, Answer]:
    return {name: answer for name, answer in session["parts"].get(part, {}).items() if "cut_off" not in answer}


def _failed(item: str, answer: Answer) -> str:
    return f"**{item}** {answer['text']}" + "".join(f"\n- at `{place}`" for place in answer["at"])
