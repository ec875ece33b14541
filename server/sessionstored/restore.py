"""`sessionstored restore`: a store of a backup that `sessionctl backup` made. Offline: it asks no daemon."""

import sys
from pathlib import Path

import click


@click.command()
@click.argument("backup", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    required=True,
    help="The data directory to be: it must be empty, or not be there yet.",
)
def restore(backup: Path, data: Path) -> None:
    """Make a store of BACKUP in an empty directory, under a new store id.

    Every file is compared with the backup's manifest first. Then serve the directory as any other. Sessions,
    revisions and what the daemon remembers of its clients' calls are those of the backup's moment: a call
    that was answered later, and is sent again, is a new call.
    """
    # Only here: the other commands start without it.
    from sessionstored.engine.jsonl import restoring

    try:
        manifest = restoring.read_manifest(backup)
        with click.progressbar(length=2 * manifest.byte_count, label="restoring", file=sys.stderr) as bar:
            restoring.verify(backup, manifest, bar.update)
            store_id = restoring.restore(backup, data, manifest, bar.update)
    except restoring.RestoreError as error:
        click.echo(f"sessionstored: {error}", err=True)
        sys.exit(1)
    made = f"{manifest.session_count:,} sessions in {len(manifest.files):,} files"
    click.echo(f"{data}: {made}, as of {manifest.taken}")
    click.echo(f"its store id is {store_id}; the backup is of store {manifest.store_id}")
    click.echo("what clients were answered is known as of that moment: a call that was answered later is new")
    for damage in manifest.damaged:
        what = f"{damage['path']}: session {damage['key']!r}: {damage['detail']}"
        click.echo(f"damaged already when it was backed up: {what}", err=True)
