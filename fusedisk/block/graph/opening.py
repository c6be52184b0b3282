"""Opening: from options to nodes, through probing, the gate and backing chains."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from fusedisk.block.graph.filenames import check_filename, parse_filename, resolve_reference
from fusedisk.block.graph.gate import ImageReference, home_of
from fusedisk.block.graph.probing import RAW, probe, tell_guess
from fusedisk.block.model.children import Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.node import Node, NodeConfig, Reference
from fusedisk.core.errors import FusediskError, GateError, ImageError, NodeNotFoundError, OptionError
from fusedisk.core.host_open import Identity, identity
from fusedisk.core.offload import run_opening
from fusedisk.core.options import nest, parse_bool

if TYPE_CHECKING:
    from fusedisk.block.graph.graph import Graph


class _Unset(enum.Enum):
    UNSET = enum.auto()


UNSET: Final = _Unset.UNSET
"""The options say nothing about the backing file, so the image's header decides."""
BackingOption = Literal[_Unset.UNSET] | str | dict[str, Any] | None
"""The user's ``backing`` option: unset, the name of an open node, the options of one to open, or None for no backing
file."""


class Opener:
    """Opens nodes into a graph. After a failure nothing stays open."""

    def __init__(self, graph: Graph, group: object | None = None, *, dormant: bool = False) -> None:
        self.graph = graph
        self.group = group
        """The group of the edges to nodes that options refer to by name."""
        self.dormant = dormant
        """Those edges are dormant, as the nodes are for a change of the graph that is not in force yet."""
        self.drivers = graph.drivers

    async def open(self, spec: str | Mapping[str, Any], config: NodeConfig, format: str | None) -> Node:
        """Open the node that ``spec`` and ``format`` describe, with all below it; see :meth:`Graph.open_node`."""
        options: dict[str, Any]
        if format is not None:
            self.drivers.load_format(format)
        if isinstance(spec, str):
            options = await run_opening(parse_filename, spec, self.drivers)
            if not spec.startswith("json:"):
                options = {"file": options}
            if format is not None:
                options["driver"] = format
        else:
            options = nest(spec)
            if format is not None:
                options.setdefault("driver", format)
        await run_opening(self._allow_named, options)
        return await self._open_chain(options, config, None)

    def _allow_named(self, options: Mapping[str, Any]) -> None:
        """Tell the gate that the user named these files, so that it lets them through. Blocks."""
        for key, value in options.items():
            if isinstance(value, Mapping):
                self._allow_named(value)
            elif isinstance(value, list):
                self._allow_named({str(index): item for index, item in enumerate(value)})
            elif key == "filename" and isinstance(value, str):
                check_filename(value)
                self.graph.gate.allow(value)

    async def _open_chain(self, options: dict[str, Any], config: NodeConfig, inherits: Node | None) -> Node:
        """Open a node, then its backing files in a loop: a chain may be too long for recursion."""
        top, backing = await self.open_one(options, config, inherits)
        node, seen = top, dict[Identity | None, Node]()
        try:
            # One step down the chain each time, until an image has no backing file.
            while (below := await self._backing_options(node, backing)) is not None:
                # Before the file is opened: the image above holds its lock, which would fail first.
                seen = seen or _images_above(top)
                found = _refuse_loop(_named_file(below[0]), seen)
                overlay = node
                node, backing = await self._open_backing(node, *below)
                seen[found] = node
                await overlay.driver.backing_opened()
        except BaseException as exc:
            # Exit 1: a look at the headers needs no more than the images so far.
            if self.graph.look_only and isinstance(exc, FusediskError):
                node.missing_backing = exc
                return top
            # Exit 2: it fails. Every node of the chain hangs on the top one, so closing that closes all.
            await self.graph.close_failed_opening(top, exc)
            raise
        # Exit 3: the chain is complete, or ends at a node that was open already.
        return top

    async def _backing_options(
        self, node: Node, given: BackingOption
    ) -> tuple[str | dict[str, Any], Reference | None] | None:
        """Return the options of the backing child to open for ``node``, and the reference if they come from the image.
        None: there is no backing child to open.

        ``given`` is the user's ``backing`` option of ``node``.
        """
        if not node.driver.supports_backing or node.backing is not None:
            return None
        if given is not UNSET:
            node.backing_overridden = True
            return None if given is None else (given, node.config.reference)
        reference = node.driver.backing_reference() if self.graph.follow_backing else None
        if reference is None:
            return None
        try:
            options, origin = await self._follow(node, reference.filename)
        except OptionError as exc:
            raise ImageError(_backing_trouble(node, exc)) from exc
        if not reference.filename.startswith("json:"):
            options = {"file": options}
        if reference.format is not None and "driver" not in options:
            options["driver"] = reference.format
        return options, origin

    async def _follow(self, node: Node, text: str) -> tuple[dict[str, Any], Reference]:
        """Return options for the file that the image ``node`` refers to as ``text``, and the reference for the gate."""
        place = self._base_file(node)

        def look() -> tuple[dict[str, Any], Reference]:
            options = parse_filename(resolve_reference(text, place), self.drivers)
            home = home_of(node.driver.storage_descriptor())
            return _without_privileged_options(options), ImageReference(
                self.graph.gate, place or node.filename, text, home
            )

        return await run_opening(look)

    async def _open_backing(
        self, node: Node, given: str | dict[str, Any], reference: Reference | None
    ) -> tuple[Node, BackingOption]:
        if isinstance(given, str):
            below = self._existing(given, node.config)
            self.graph.attach_child(node, below, "backing", Role.BACKING, dormant=self.dormant)
            return below, UNSET
        config = dataclasses.replace(node.config.defaults_for_child(Role.BACKING), reference=reference)
        below, deeper = await self._open_with_context(node, given, config)
        try:
            self.graph.attach_child(node, below, "backing", Role.BACKING)
        except BaseException as exc:
            await self.graph.close_failed_opening(below, exc)
            raise
        return below, deeper

    async def _open_with_context(
        self, node: Node, given: dict[str, Any], config: NodeConfig
    ) -> tuple[Node, BackingOption]:
        """Open a backing file; errors name the image that refers to it."""
        try:
            return await self.open_one(given, config, node)
        except GateError:  # names the image already
            raise
        except FusediskError as exc:
            if isinstance(exc, OptionError) and not node.backing_overridden:  # the image says so, not the user
                raise ImageError(_backing_trouble(node, exc)) from exc
            exc.message = _backing_trouble(node, exc)
            raise

    def _existing(self, name: str, config: NodeConfig) -> Node:
        """Return the open node ``name``, to which the options of a node with ``config`` refer."""
        if config.reference is not None:
            config.reference.check_node(name)
        found = self.graph.node(name)
        if not found.is_open:
            raise NodeNotFoundError(f"node '{name}' is not open yet.")
        return found

    @staticmethod
    def _base_file(node: Node) -> str | None:
        """Return the local file whose directory is the base for relative references of ``node``."""
        storage = node.storage
        return storage.node.exact_filename() if storage else node.exact_filename()

    async def open_child(
        self, parent: Node, name: str, role: Role, reference: str | dict[str, Any], *, implicit: bool
    ) -> Child:
        """See :meth:`Graph.open_child`."""
        options: dict[str, Any]
        if isinstance(reference, str) and not implicit:
            below = self._existing(reference, parent.config)
            return self.graph.attach_child(parent, below, name, role, group=self.group, dormant=self.dormant)
        config = parent.config.defaults_for_child(role)
        if isinstance(reference, str):
            options, config.reference = await self._follow(parent, reference)
        else:
            options = reference
        if role in (Role.FILE, Role.DATA_FILE) and "driver" not in options:
            options = self._protocol_options(options)
        node = await self._open_chain(options, config, parent)
        try:
            edge = self.graph.attach_child(parent, node, name, role)
        except BaseException as exc:
            await self.graph.close_failed_opening(node, exc)
            raise
        edge.implied = implicit
        return edge

    def _protocol_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Add the protocol driver that the file name asks for to storage options without a driver."""
        filename = options.get("filename")
        if not isinstance(filename, str):
            raise OptionError("options of a 'file' child need a 'driver' or a 'filename'.")
        return parse_filename(filename, self.drivers) | {k: v for k, v in options.items() if k != "filename"}

    async def open_one(
        self, options: dict[str, Any], config: NodeConfig, inherits: Node | None
    ) -> tuple[Node, BackingOption]:
        """Open one node with all its children but the backing file. Returns it and the user's ``backing``
        option."""
        options = dict(options)
        config, explicit = pop_common_options(options, config)
        name = _pop_string(options, "node-name")
        backing: BackingOption = _pop_child(options, "backing") if "backing" in options else UNSET
        driver_name = _pop_string(options, "driver")
        if driver_name is None or not self.drivers.load(driver_name).is_protocol:
            self._filename_to_file(options)
        if driver_name is None:
            return await self._open_probed(options, config, explicit, inherits, name, backing)
        driver_type = self.drivers.load(driver_name)
        if backing is not UNSET and not driver_type.supports_backing:
            raise OptionError(f"{driver_name} has no backing file, the option 'backing' is for formats that do.")
        specs = driver_type.children_of(options)
        children = [_pop_child(options, spec.name) for spec in specs]
        node = self.graph.new_node(name, config, explicit, inherits)
        try:
            node.driver = driver_type(node, driver_type.options_type.parse(options, driver_name))
            for spec, given in zip(specs, children, strict=True):
                if given is not None:
                    await self.open_child(node, spec.name, spec.role, given, implicit=False)
                elif spec.required:
                    raise OptionError(f"{driver_name} needs the option '{spec.name}'.")
            await self.graph.start(node)
        except BaseException as exc:
            await self.graph.close_failed_opening(node, exc, opened=False)
            raise
        return node, backing

    def _filename_to_file(self, options: dict[str, Any]) -> None:
        """``driver=qcow2,filename=x`` means ``file.filename=x``."""
        filename = options.pop("filename", None)
        if filename is not None:
            if "file" in options:
                raise OptionError("'filename' and 'file' name the same thing: give one of them.")
            options["file"] = parse_filename(str(filename), self.drivers)

    async def _open_probed(
        self,
        options: dict[str, Any],
        config: NodeConfig,
        explicit: frozenset[str],
        inherits: Node | None,
        name: str | None,
        backing: BackingOption,
    ) -> tuple[Node, BackingOption]:
        """Open the storage, detect the format from its bytes, and open that over it."""
        given = _pop_child(options, "file")
        if given is None:
            raise OptionError("an image needs the option 'driver', 'file' or 'filename'.")
        storage: Node
        if isinstance(given, str):
            storage = self._existing(given, config)
        else:
            if "driver" not in given:
                given = self._protocol_options(given)
            storage = await self._open_chain(given, config.defaults_for_child(Role.FILE), None)
        try:
            driver_type = await probe(self.drivers, storage, inherits)
            node = self.graph.new_node(name, config, explicit, inherits)
            node.probed = True
            node.guards_probe = driver_type.name == RAW
            if not isinstance(given, str):
                storage.inherits_from = node
        except BaseException as exc:
            await self.graph.close_failed_opening(storage, exc)
            raise
        try:
            node.driver = driver_type(node, driver_type.options_type.parse(options, driver_type.name))
            if backing is not UNSET and not driver_type.supports_backing:
                raise OptionError(f"'{storage.filename}' is {driver_type.name}, which has no backing file.")
            dormant = self.dormant and isinstance(given, str)
            self.graph.attach_child(node, storage, "file", Role.FILE, dormant=dormant)
            await self.graph.start(node)
            if node.guards_probe and not self.graph.look_only:
                tell_guess(storage, inherits)
        except BaseException as exc:
            await self.graph.close_failed_opening(node, exc, opened=False)
            if storage.name in self.graph.nodes:
                await self.graph.close_failed_opening(storage, exc)
            raise
        return node, backing


def _backing_trouble(node: Node, exc: FusediskError) -> str:
    return f"the backing file of '{node.filename}' cannot be opened: {exc.message}"


def _images_above(node: Node | None) -> dict[Identity | None, Node]:
    """Return ``node`` and each image above for which it is being opened, by the identity of its file."""
    found: dict[Identity | None, Node] = {}
    while node is not None:
        found[_file_identity(node.exact_filename())] = node
        node = node.inherits_from
    return found


def _refuse_loop(name: str | None, seen: dict[Identity | None, Node]) -> Identity | None:
    """Return the identity of the file. Raises ImageError if it is the file of an image above.

    Call it before the file is opened, since the image above holds its lock.
    """
    found = _file_identity(name)
    if found is not None and found in seen:
        raise ImageError(f"the backing chain of '{seen[found].filename}' is circular: it comes back to '{name}'.")
    return found


def _named_file(options: Any) -> str | None:
    """Return the local file that options for an image name, None if they name none."""
    while isinstance(options, Mapping):
        if isinstance(filename := options.get("filename"), str):
            return filename
        options = options.get("file")
    return None


def _file_identity(filename: str | None) -> Identity | None:
    """Return device and inode number, which are equal if two names lead to the same file."""
    if filename is None:
        return None
    try:
        return identity(os.stat(filename))
    except (OSError, ValueError):
        return None


def _without_privileged_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an image's reference without those reserved to the user: node names and write access."""
    return {
        key: _without_privileged_options(value) if isinstance(value, dict) else value
        for key, value in options.items()
        if key not in ("node-name", "read-only", "auto-read-only")
    }


def _pop_string(options: dict[str, Any], name: str) -> str | None:
    """Remove a string from ``options`` and return it; None if it is missing."""
    value = options.pop(name, None)
    if value is not None and not isinstance(value, str):
        raise OptionError(f"option '{name}' is a {type(value).__name__}, expected a string.")
    if value == "":
        raise OptionError(f"option '{name}' is empty.")
    return value


def _pop_child(options: dict[str, Any], name: str) -> str | dict[str, Any] | None:
    """Remove the description of a child from ``options`` and return it; None if it is missing. Of a list, the first
    item is removed: call it in the order of the list."""
    group, dot, index = name.rpartition(".")
    if dot and index.isdigit():
        value = _pop_first(options, group)
    else:
        value = options.pop(name, None)
    if value is not None and not isinstance(value, (str, dict)):
        raise OptionError(f"option '{name}' is a {type(value).__name__}, expected the name of a node or its options.")
    return value


def _pop_first(options: dict[str, Any], name: str) -> Any:
    """Remove the first item of a list, and the list with its last item. Returns None if there is none."""
    items = options.pop(name, None)
    if not items:
        return None
    if not isinstance(items, list):
        raise OptionError(f"option '{name}' is a {type(items).__name__}, expected a list.")
    first, *rest = items
    if rest:
        options[name] = rest
    return first


def pop_common_options(options: dict[str, Any], defaults: NodeConfig) -> tuple[NodeConfig, frozenset[str]]:
    """Remove the options that every node has from ``options``. Returns the settings, and the fields of NodeConfig that
    the options set. Raises OptionError."""
    found: dict[str, Any] = {}
    for key in ("read-only", "auto-read-only", "force-share", "copy-on-read"):
        if key in options:
            found[key.replace("-", "_")] = parse_bool(options.pop(key), f"option '{key}'")
    cache = options.pop("cache", {})
    if not isinstance(cache, dict) or cache.keys() - {"direct", "no-flush"}:
        raise OptionError("the option 'cache' has the members 'direct' and 'no-flush'.")
    for key, value in cache.items():
        found[f"cache_{key.replace('-', '_')}"] = parse_bool(value, f"option 'cache.{key}'")
    if "discard" in options:
        choice = _choice(options.pop("discard"), "discard", ("ignore", "unmap", "off", "on"))
        found["discard"] = "unmap" if choice in ("unmap", "on") else "ignore"
    if "detect-zeroes" in options:
        found["detect_zeroes"] = _choice(options.pop("detect-zeroes"), "detect-zeroes", ("off", "on", "unmap"))
    config = dataclasses.replace(defaults, **found)
    if config.force_share and not config.read_only:
        raise OptionError("force-share is for read-only images: add read-only=on.")
    return config, frozenset(found)


def _choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise OptionError(f"option '{name}' is '{value}', expected one of {', '.join(choices)}.")
    return str(value)
