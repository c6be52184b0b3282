"""Opening: from options to nodes, through probing, the gate and backing chains."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusedisk.block.child import Child
from fusedisk.block.driver import Role
from fusedisk.block.filenames import check_filename, parse_filename, resolve_reference
from fusedisk.block.node import Node, NodeConfig
from fusedisk.block.probing import RAW, probe, tell_guess
from fusedisk.core.errors import FusediskError, ImageError, OptionError
from fusedisk.core.options import nest, parse_bool

if TYPE_CHECKING:
    from fusedisk.block.graph import Graph


class Opener:
    """Opens nodes into a graph. Whatever fails, nothing of it stays open."""

    def __init__(self, graph: Graph, group: object | None = None) -> None:
        self.graph = graph
        self.group = group
        """Of the edges to nodes that options refer to by name."""
        self.drivers = graph.drivers

    async def open(self, spec: str | Mapping[str, Any], config: NodeConfig, format: str | None) -> Node:
        """See :meth:`Graph.open_node`."""
        options: dict[str, Any]
        if format is not None:
            self.drivers.load_format(format)
        if isinstance(spec, str):
            self._allow_named(parsed := parse_filename(spec, self.drivers))
            if spec.startswith("json:"):
                options = parsed
                if format is not None:
                    options["driver"] = format
            else:
                options = {"file": parsed}
                if format is not None:
                    options["driver"] = format
        else:
            options = nest(spec)
            if format is not None:
                options.setdefault("driver", format)
            self._allow_named(options)
        return await self._open_chain(options, config, None)

    def _allow_named(self, options: Mapping[str, Any]) -> None:
        """Tell the gate that the user named these files, so that it lets them through."""
        for key, value in options.items():
            if isinstance(value, Mapping):
                self._allow_named(value)
            elif key == "filename" and isinstance(value, str):
                check_filename(value)
                self.graph.gate.allow(value)

    async def _open_chain(self, options: dict[str, Any], config: NodeConfig, inherits: Node | None) -> Node:
        """Open a node, then its backing files one after the other: chains may be long, so no recursion."""
        top, backing = await self.open_one(options, config, inherits)
        node, seen = top, dict[tuple[int, int] | None, Node]()
        try:
            while (backing := self._backing_options(node, backing)) is not None:
                seen = seen or _images_above(top)
                name = _named_file(backing)
                identity = _file_identity(name)
                if identity is not None and identity in seen:
                    raise ImageError(
                        f"the backing chain of '{seen[identity].filename}' comes back to '{name}', "
                        "a chain must end somewhere."
                    )
                overlay = node
                node, backing = await self._open_backing(node, backing)
                seen[identity] = node
                await overlay.driver.backing_opened()
        except BaseException as exc:
            if self.graph.look_only and isinstance(exc, FusediskError):
                node.missing_backing = exc
                return top
            await self.graph.abandon(top, exc)
            raise
        return top

    def _backing_options(self, node: Node, given: Any) -> Any:
        """Options of the backing child to open for ``node``, None where it has none.

        ``given`` is what the user's options say, ... where they say nothing.
        """
        if not node.driver.supports_backing or node.backing is not None:
            return None
        if given is not ...:
            node.backing_overridden = True
            return given
        reference = node.driver.backing_reference() if self.graph.follow_backing else None
        if reference is None:
            return None
        place = self._place(node)
        try:
            filename = resolve_reference(reference.filename, place)
            parsed = parse_filename(filename, self.drivers)
            self.graph.gate.check(parsed, place or node.filename, reference.filename)
        except OptionError as exc:
            raise ImageError(_backing_trouble(node, exc)) from exc
        parsed = _harmless(parsed)
        options: dict[str, Any] = parsed if filename.startswith("json:") else {"file": parsed}
        if reference.format is not None and "driver" not in options:
            options["driver"] = reference.format
        return options

    async def _open_backing(self, node: Node, given: Any) -> tuple[Node, Any]:
        if isinstance(given, str):
            below = self.graph.node(given)
            self.graph.attach_child(node, below, "backing", Role.BACKING)
            return below, ...
        below, deeper = await self._open_guarded(node, given)
        try:
            self.graph.attach_child(node, below, "backing", Role.BACKING)
        except BaseException as exc:
            await self.graph.abandon(below, exc)
            raise
        return below, deeper

    async def _open_guarded(self, node: Node, given: dict[str, Any]) -> tuple[Node, Any]:
        """Open a backing file; failures name the image that wants it."""
        try:
            return await self.open_one(given, node.config.inherited(Role.BACKING), node)
        except FusediskError as exc:
            if isinstance(exc, OptionError) and not node.backing_overridden:  # the image says so, not the user
                raise ImageError(_backing_trouble(node, exc)) from exc
            exc.message = _backing_trouble(node, exc)
            raise

    @staticmethod
    def _place(node: Node) -> str | None:
        """The local file whose directory relative references of ``node`` start from."""
        storage = node.children.get("file")
        return storage.node.exact_filename() if storage else node.exact_filename()

    async def open_child(
        self, parent: Node, name: str, role: Role, reference: str | dict[str, Any], *, implicit: bool
    ) -> Child:
        """Open and attach a child for a driver; see :meth:`Node.open_child`."""
        options: dict[str, Any]
        if isinstance(reference, str) and not implicit:
            return self.graph.attach_child(parent, self.graph.node(reference), name, role, group=self.group)
        if isinstance(reference, str):
            place = self._place(parent)
            parsed = parse_filename(resolve_reference(reference, place), self.drivers)
            self.graph.gate.check(parsed, place or parent.filename, reference)
            options = _harmless(parsed)
        else:
            options = reference
        config = parent.config.inherited(role)
        if role in (Role.FILE, Role.DATA_FILE) and "driver" not in options:
            options = self._protocol_options(options)
        node = await self._open_chain(options, config, parent)
        try:
            edge = self.graph.attach_child(parent, node, name, role)
        except BaseException as exc:
            await self.graph.abandon(node, exc)
            raise
        edge.implied = implicit
        return edge

    def _protocol_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Give storage options without a driver the protocol that their file name asks for."""
        filename = options.get("filename")
        if not isinstance(filename, str):
            raise OptionError("options of a 'file' child need a 'driver' or a 'filename'.")
        return parse_filename(filename, self.drivers) | {k: v for k, v in options.items() if k != "filename"}

    async def open_one(self, options: dict[str, Any], config: NodeConfig, inherits: Node | None) -> tuple[Node, Any]:
        """Open one node with its file-like children, not its backing file. Returns it and the user's ``backing``
        option, ... where there is none."""
        options = dict(options)
        config, explicit = common_options(options, config)
        name = _string(options, "node-name")
        backing = _child(options, "backing") if "backing" in options else ...
        driver_name = _string(options, "driver")
        if driver_name is None or not self.drivers.load(driver_name).is_protocol:
            self._filename_to_file(options)
        if driver_name is None:
            return await self._open_probed(options, config, explicit, inherits, name, backing)
        driver_type = self.drivers.load(driver_name)
        if backing is not ... and not driver_type.supports_backing:
            raise OptionError(f"{driver_name} has no backing file, the option 'backing' is for formats that do.")
        children = {spec.name: _child(options, spec.option_name) for spec in driver_type.child_specs}
        node = self.graph.new_node(name, config, explicit, inherits)
        try:
            node.driver = driver_type(node, driver_type.options_type.parse(options, driver_name))
            for spec in driver_type.child_specs:
                if (given := children[spec.name]) is not None:
                    await self.open_child(node, spec.name, spec.role, given, implicit=False)
                elif spec.required:
                    raise OptionError(f"{driver_name} needs the option '{spec.option_name}'.")
            await self.graph.start(node)
        except BaseException as exc:
            await self.graph.abandon(node, exc, opened=False)
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
        backing: Any,
    ) -> tuple[Node, Any]:
        """Open the storage, look at its bytes, and open the format that they show over it."""
        given = _child(options, "file")
        if given is None:
            raise OptionError("an image needs the option 'driver', 'file' or 'filename'.")
        storage: Node
        if isinstance(given, str):
            storage = self.graph.node(given)
        else:
            if "driver" not in given:
                given = self._protocol_options(given)
            storage = await self._open_chain(given, config.inherited(Role.FILE), None)
        try:
            driver_type = await probe(self.drivers, storage, inherits)
            node = self.graph.new_node(name, config, explicit, inherits)
            node.probed = True
            node.guards_probe = driver_type.name == RAW
            if not isinstance(given, str):
                storage.inherits_from = node
        except BaseException as exc:
            await self.graph.abandon(storage, exc)
            raise
        try:
            node.driver = driver_type(node, driver_type.options_type.parse(options, driver_type.name))
            if backing is not ... and not driver_type.supports_backing:
                raise OptionError(f"'{storage.filename}' is {driver_type.name}, which has no backing file.")
            self.graph.attach_child(node, storage, "file", Role.FILE)
            await self.graph.start(node)
            if node.guards_probe and not self.graph.look_only:
                tell_guess(storage, inherits)
        except BaseException as exc:
            await self.graph.abandon(node, exc, opened=False)
            if storage.name in self.graph.nodes:
                await self.graph.abandon(storage, exc)
            raise
        return node, backing


def _backing_trouble(node: Node, exc: FusediskError) -> str:
    return f"the backing file of '{node.filename}' cannot be opened: {exc.message}"


def _images_above(node: Node | None) -> dict[tuple[int, int] | None, Node]:
    """By the identity of its file, ``node`` and each image for whose sake it is being opened."""
    found: dict[tuple[int, int] | None, Node] = {}
    while node is not None:
        found[_file_identity(node.exact_filename())] = node
        node = node.inherits_from
    return found


def _named_file(options: Any) -> str | None:
    """The local file that options for an image name, None where they name none."""
    while isinstance(options, Mapping):
        if isinstance(filename := options.get("filename"), str):
            return filename
        options = options.get("file")
    return None


def _file_identity(filename: str | None) -> tuple[int, int] | None:
    """What tells that two names lead to the same file."""
    if filename is None:
        return None
    try:
        found = os.stat(filename)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _harmless(options: dict[str, Any]) -> dict[str, Any]:
    """Options that an image gives in a reference: it may neither take names nor say what is opened for writing."""
    return {
        key: _harmless(value) if isinstance(value, dict) else value
        for key, value in options.items()
        if key not in ("node-name", "read-only", "auto-read-only")
    }


def _string(options: dict[str, Any], name: str) -> str | None:
    """Take a string out of ``options``; None where it is not there."""
    value = options.pop(name, None)
    if value is not None and not isinstance(value, str):
        raise OptionError(f"option '{name}' is a {type(value).__name__}, expected a string.")
    if value == "":
        raise OptionError(f"option '{name}' is empty.")
    return value


def _child(options: dict[str, Any], name: str) -> str | dict[str, Any] | None:
    """Take what describes a child out of ``options``; None where it is not there."""
    value = options.pop(name, None)
    if value is not None and not isinstance(value, (str, dict)):
        raise OptionError(f"option '{name}' is a {type(value).__name__}, expected the name of a node or its options.")
    return value


def common_options(options: dict[str, Any], defaults: NodeConfig) -> tuple[NodeConfig, frozenset[str]]:
    """Take the options that every node has out of ``options``. Returns the settings, and the names of the fields of
    NodeConfig that the options set. Raises OptionError."""
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
        found["discard_unmap"] = choice in ("unmap", "on")
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
