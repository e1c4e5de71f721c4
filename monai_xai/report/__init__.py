"""The grounding report: one HTML file that needs nothing else, for clinicians, engineers and printers."""

from __future__ import annotations

from pathlib import Path

from monai_xai.cohorts import ModalityCohort
from monai_xai.files import write_whole
from monai_xai.grounding import Grounding
from monai_xai.report.markup import Html, element
from monai_xai.report.names import disguise_of, disguised, disguised_cohort
from monai_xai.report.pages import case_page, cohort_page, engineer_page
from monai_xai.report.pictures import figures_of_grounding, scalars_of_grounding
from monai_xai.report.style import STYLE

__all__ = ["figures_of_grounding", "scalars_of_grounding", "write_report"]


def write_report(
    grounding: Grounding,
    path: str | Path,
    *,
    anonymize: bool = False,
    salt: str | None = None,
    title: str = "Is the explanation grounded?",
    modalities: ModalityCohort | None = None,
) -> Path:
    """Write a verdict and everything that it rests on as one HTML file, and return its path.

    The file loads nothing, runs nothing (its own content security policy forbids it) and prints a page for every case.
    It begins with the cohort and the verdict; a clinician's page for every case follows, and one for engineers.

    Args:
        grounding: the verdict and what it rests on.
        path: the file; its folder is made.
        anonymize: replace the names of cases by salted hashes wherever they stand, also within other words.
        salt: key of the hashes, which is written nowhere: with one salt a case has one name in all reports. None draws
            one, so that names are new in every report. Not a seed that is published: who knows the salt can try names.
        title: of the report.
        modalities: what modalities contribute in these cases, for the bars.

    Raises:
        OSError: naming the file and what to do, if it cannot be written; what was there before is left as it was.
    """
    if anonymize:
        names = disguise_of(grounding, modalities, salt)
        grounding, title = disguised(grounding, names), names.words(title)
        modalities = None if modalities is None else disguised_cohort(modalities, names)
    file = Path(path)
    text = _document(grounding, title, modalities)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    except OSError as error:
        cure = "free disk space, and check that the folder may be written to"
        raise OSError(error.errno, f"{file} is not written ({error.strerror or error}): {cure}") from error
    return file


def _document(grounding: Grounding, title: str, modalities: ModalityCohort | None) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = [
        element("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(STYLE)),
    ]
    body = [
        cohort_page(grounding, title, modalities),
        *(case_page(grounding, index, modalities) for index in range(len(grounding.cases))),
        engineer_page(grounding),
    ]
    page = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"
