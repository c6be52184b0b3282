"""What the record of a mount says of a file. Blocks for a moment."""

from __future__ import annotations

from collections.abc import Iterable

from fusedisk.export.export import Export
from fusedisk.export.views import View
from fusedisk.mount.runtime import ExportRecord, MountRecord, file_identity


def export_record(export: Export) -> ExportRecord:
    """The description of a file as it is now."""
    part_of = export.disk.name if isinstance(export, View) else None
    if export.empty:
        return ExportRecord(export.name, image="", format="", size=0, read_only=not export.writable, part_of=part_of)
    record = ExportRecord(
        name=export.name,
        image=export.image.exact_filename() or export.source,
        format=export.image.driver.name,
        size=export.backend.length,
        read_only=not export.writable,
        overlay=export.overlay,
        file=file_identity(export.image.exact_filename()),
        part_of=part_of,
    )
    if part_of is None:
        identities = {name: file_identity(name) for name in export.chain_files()}
        # The file of a throw-away layer has no name.
        record.files = {name: identity for name, identity in identities.items() if identity is not None}
        record.written = [
            name for name in export.chain_files(backing=False) if export.writable and name in record.files
        ]
    return record


def rewrite(record: MountRecord, exports: Iterable[Export]) -> None:
    """Write a record anew for the files that there are now. Raises HostError."""
    record.exports = [export_record(export) for export in exports]
    record.write()
