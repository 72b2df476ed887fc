"""`hf-compress push`: a saved model to the Hub, from the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_compress.report.tables import megabytes, print_json, show_facts, show_table

if TYPE_CHECKING:
    from hf_compress.hub.push import Upload


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model, of a run that of its last step.")],
    repo_id: Annotated[str, typer.Argument(help="Where to, such as me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if there is none. By default main.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files and their sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, for other programs.")] = False,
) -> None:
    """Upload a saved model with its tokenizer and card to the Hub, in one commit.

    \b
    The token is that of `hf auth login` or of HF_TOKEN. If the upload is cut
    off, the same command completes it: files that arrived are not sent again.

    \b
    Examples:
      hf-compress push ./out/05-quantize me/my-model --dry-run
      hf-compress push ./out/05-quantize me/my-model --private
    """
    from hf_compress.hub.push import push_compressed

    upload = push_compressed(folder, repo_id, private=private or None, revision=revision, dry_run=dry_run)
    if as_json:
        print_json(upload.to_dict())
    else:
        show_upload(upload)


def show_upload(upload: "Upload") -> None:
    """Shows what was uploaded, or would be.

    Args:
        upload (`Upload`): As `push_compressed` returns it.
    """
    rows = [(name, megabytes(size)) for name, size in upload.files.items()]
    show_table(("file", "MB"), [*rows, ("in all", megabytes(upload.n_bytes))])
    facts = [
        ("left out", ", ".join(upload.left_out)),
        ("to", f"{upload.repo_id}, {upload.revision}"),
        ("commit", upload.commit or "none: nothing was uploaded"),
        ("address", upload.url or ""),
    ]
    show_facts([(name, value) for name, value in facts if value])
