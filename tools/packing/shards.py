"""The shards of a data set: a file, all files of a kind below a folder, or a pattern of paths."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pipeline import folders
from pipeline.errors import UserError, printable
from tools.packing import archives, files
from tools.packing.places import Place, is_file, walk
from tools.packing.remote import Remote
from tools.packing.sources import Source, require_any

_GLOB = re.compile(r"[*?]")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,12})\.\.([0-9]{1,12})")
_OF = re.compile(r"(.*?)-([0-9]+)-of-([0-9]+)(?:-[0-9a-f]{16})?\.[a-z]+")
MAX_SHARDS = 1_000_000


def add_shards(
    source: Source, pattern: str, suffix: str, add: Callable[[Place, str], None]
) -> Source:
    """Call `add` with the path and the name of each shard, in order, and refuse a source in which
    nothing is good. `pattern` is what `find_shards` returned.
    """
    for name in _named(source.root, pattern, suffix, source.left):
        add(source.root / name, name)
    if not len(source):
        seen = ", ".join(f"{n:,} {printable(kind)}" for kind, n in source.left.most_common(6))
        hold = f"; left aside: {seen}" if seen else ""
        choose = "; --image NAME chooses an ending" if suffix == ".tar" and seen else ""
        raise UserError(f"{source.root / pattern}: the shards hold no images{hold}{choose}")
    return require_any(source)


def find_shards(root: Place, suffix: str) -> tuple[Place, str]:
    """The folder of the shards that `--root` names, and their pattern below it: "" for all.

    `root` is a file, a folder, a folder of Hugging Face's cache, or a path with {000..123}, {a,b},
    * or ?. Of a URL, only the last part can be a pattern.
    """
    if suffix == ".tar" and root.name.lower().endswith(archives.UNREAD):
        raise UserError(f"{root}: {archives.COMPRESSED}")
    if (re.search(r"[*?{]", root.name) and isinstance(root, Remote)) or is_file(root, (suffix,)):
        return root.parent, root.name
    if isinstance(root, Remote):
        return root, ""
    if folders.is_folder(root):
        return _snapshot(root), ""
    parts = root.parts
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?{]", part)), None)
    if first is None:
        folders.require_root(root)
    base = Path(*parts[:first])
    folders.require_root(base)
    return base, "/".join(parts[first:])


def _snapshot(root: Path) -> Path:
    """The newest revision in a folder datasets--ORG--NAME of Hugging Face's cache; else `root`."""
    snapshots, main = root / "snapshots", root / "refs" / "main"
    if not folders.is_folder(snapshots):
        return root
    found = sorted(entry.name for entry in files.entries(snapshots, folders.Left()))
    if folders.is_file(main):
        found = [main.read_text("utf-8", "replace").strip()[:100]]
    if len(found) != 1 or not re.fullmatch(r"[0-9a-zA-Z._-]+", found[0]):
        raise UserError(f"{snapshots}: holds {len(found)} revisions: give one of them as --root")
    return snapshots / found[0]


def _named(root: Place, pattern: str, suffix: str, left: folders.Left) -> Iterator[str]:
    """The shards below `root` in order: those of `pattern`, or all if they are of one kind."""
    if pattern and not _GLOB.search(pattern):
        yield from expanded(pattern)
        return
    found = sorted(_walked(root, suffix, left))
    if not pattern:
        _require_one_kind(root, found, suffix)
        yield from found
        return
    for one in expanded(pattern):
        known = {"*": "[^/]*", "?": "[^/]"}
        text = "".join(known.get(letter, re.escape(letter)) for letter in one)
        matching = [name for name in found if re.fullmatch(text, name)]
        if not matching:
            raise UserError(f"{root / one}: no {suffix} file has such a name")
        yield from matching


def _walked(root: Place, suffix: str, left: folders.Left) -> Iterator[str]:
    for name, fault in files.bounded(walk(root, left), root):
        if fault:
            raise UserError(f"{printable(str(root / name))}: {fault}")
        if suffix == ".tar" and name.lower().endswith(archives.UNREAD):
            raise UserError(f"{printable(str(root / name))}: {archives.COMPRESSED}")
        if name.lower().endswith(suffix):
            yield name
        else:
            folders.is_image(name.lower(), left)


def expanded(pattern: str) -> Iterator[str]:
    """The paths of a pattern with {000..123} and {a,b}, as a shell expands them: the last braces
    change first. Raises UserError if they are too many.
    """
    texts = re.split(_BRACES, pattern)
    choices = [list(_choices(text)) for text in texts[1::2]]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_SHARDS:
        raise UserError(f"{pattern}: {count:,} shards; at most {MAX_SHARDS:,}")
    for chosen in itertools.product(*choices):
        yield "".join(itertools.chain(*itertools.zip_longest(texts[::2], chosen, fillvalue="")))


def _choices(text: str) -> Iterable[str]:
    if not (match := _RANGE.fullmatch(text)):
        return text.split(",")
    first, last = int(match[1]), int(match[2])
    step = 1 if first <= last else -1
    if abs(last - first) >= MAX_SHARDS:
        raise UserError(f"{{{text}}}: more than {MAX_SHARDS:,} shards")
    padded = max(map(len, match.groups())) if "0" in (match[1][0], match[2][0]) else 0
    return (f"{number:0{padded}d}" for number in range(first, last + step, step))


def _require_one_kind(root: Place, names: list[str], suffix: str) -> None:
    """Refuse shards of several splits, which must not be mixed, and an incomplete set of shards."""
    if not names:
        raise UserError(f"{root}: expected {suffix} files; {files.contents(root)}")
    kinds: dict[str, str] = {}
    for name in names:
        kind = re.sub(r"-[0-9a-f]{16}(?=\.[a-z]+$)", "", name)
        kinds.setdefault(re.sub(r"[0-9]+", "0", kind), re.sub(r"[0-9]+(-of-[0-9]+)?", "*", kind))
    if len(kinds) > 1:
        shown = ", ".join(printable(kind) for kind in list(kinds.values())[:6])
        example = printable(str(root / next(iter(kinds.values()))))
        raise UserError(
            f"{root}: holds shards of {len(kinds)} names, perhaps of several splits: {shown};"
            f" choose some with a pattern: --root '{example}'"
        )
    of = [match for name in names if (match := _OF.fullmatch(name))]
    total = int(of[0][3]) if of else 0
    if total > MAX_SHARDS:
        raise UserError(f"{root / names[0]}: of {total:,} shards; at most {MAX_SHARDS:,}")
    present = Counter(int(match[2]) for match in of)
    missing = [i for i in range(total) if i not in present]
    if missing:
        shown = ", ".join(f"{of[0][1]}-{i:05d}-of-{total:05d}" for i in missing[:5])
        raise UserError(
            f"{root}: {len(missing):,} of {total:,} shards are missing: {printable(shown)}"
            f"{', …' * (len(missing) > 5)}; a pattern as --root takes those that are there"
        )
