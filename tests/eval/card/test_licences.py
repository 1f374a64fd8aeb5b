"""What licences ask for, word for word, and how they are known: by card, text and id."""

import pytest

from downcycle.eval.card.licences import (
    KNOWN,
    duties,
    is_own_notice,
    known_licence,
    licence_in_card,
    licence_in_text,
    licence_of_id,
    name_fault,
    notice,
)

FITS = {
    "llama3": ["Llama-3-6B", "llama-3-6b-v0.1", "Llama_3_6B", "Llama 3 small", "Llama3-6B", "me/Llama-3-6B", "Llama-3.1-like"],
    "llama3.1": ["Llama-3.1-6B", "Llama-tiny", "me/llama_x", "Llama", "Llama3.1-6B", "Llama3-6B"],
    "llama3.2": ["Llama-3.2-1B"],
    "llama3.3": ["Llama-x"],
    "llama4": ["Llama-4-Scout-cut"],
    "llama2": ["anything"],
    "gemma": ["anything"],
    "apache-2.0": ["anything"],
    "some-licence-of-tomorrow": ["anything"],
    None: ["anything"],
}
FAULTS = {
    "llama3": ["Meta-Llama-3-6B", "my-Llama-3", "Llama-2-7B", "Llama-32B", "Llama", "Llama-3-6B/other", "6B", "Llama-3-6B/Alpaca"],
    "llama3.1": ["Meta-Llama-3.1-6B", "Alpaca", "Llama-3.1-6B/Alpaca", "lama"],
    "llama3.2": ["mobile-llama"],
    "llama3.3": ["Dolphin"],
    "llama4": ["Scout"],
    "LLAMA3": ["Alpaca"],
}


@pytest.mark.parametrize("licence", FITS)
def test_a_name_that_a_licence_allows(licence):
    assert [name_fault(licence, name) for name in FITS[licence]] == [None] * len(FITS[licence])


@pytest.mark.parametrize("licence", FAULTS)
def test_a_name_that_a_licence_forbids_is_told_with_the_licence_and_the_beginning(licence):
    for name in FAULTS[licence]:
        fault = name_fault(licence, name)
        assert "\n" not in fault and "Community License Agreement" in fault
        assert ("'Llama 3'" if licence.lower() == "llama3" else "'Llama'") in fault
        assert fault.startswith(name.rpartition("/")[2])


@pytest.mark.parametrize("version", ["3.1", "3.2", "3.3", "4"])
def test_the_notice_of_each_llama_names_its_version(version):
    text = f"Llama {version} is licensed under the Llama {version} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
    assert notice(f"llama{version}") == f"{text}\n"
    assert KNOWN[f"llama{version}"].built_with == "Built with Llama"


def test_the_notices_of_the_others():
    meta = "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
    assert notice("llama3") == meta
    assert KNOWN["llama3"].built_with == "Built with Meta Llama 3"
    assert notice("gemma") == "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
    assert [notice(name) for name in ("mit", "apache-2.0", "tomorrow", None)] == [None] * 4


@pytest.mark.parametrize("version", ["llama3.2", "llama4"])
def test_the_clause_on_multimodal_models_and_the_eu_is_told_where_it_is(version):
    assert any("European Union" in line and "multimodal" in line for line in duties(known_licence(version), True))
    assert not any("European Union" in line for line in duties(known_licence("llama3.1"), True))


def test_gemmas_terms_ask_that_changes_are_told():
    assert [line for line in duties(known_licence("gemma"), True) if "changed" in line and "section 3.2" in line]
    assert not any("section 3.2" in line for line in duties(known_licence("llama3"), True))


@pytest.mark.parametrize("licence", ["apache-2.0", "mit", "llama3", "gemma"])
def test_a_copy_of_the_licence_is_told_where_there_is_one(licence):
    told, untold = duties(known_licence(licence), True), duties(known_licence(licence), False)
    assert set(told) - set(untold) == {"A copy of the licence goes with the model."} and set(untold) < set(told)


def test_the_notices_written_here_are_known_to_the_byte():
    assert all(is_own_notice(notice(name)) for name in ("llama2", "llama3", "llama3.3", "gemma"))
    assert not any(map(is_own_notice, ["", notice("llama3")[:-1], notice("llama3") + "Mine.\n"]))


def test_a_licence_is_known_by_the_metadata_of_a_card():
    assert licence_in_card({"license": "Llama3"}) == "llama3"
    assert licence_in_card({"license": "other", "license_name": "llama4"}) == "llama4"
    assert licence_in_card({"license": "other", "license_name": "Acme"}) == "Acme"
    assert licence_in_card({"license": ["mit"]}) == "mit"
    assert [licence_in_card(data) for data in ({}, {"license": "other"}, {"license": "unknown"}, {"license": 3}, {"license": ""})] == [
        None
    ] * 5
    assert licence_in_card({"license": ["mit", "gpl"]}) is None


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n...", "llama3"),
        ("Meta Llama 3 Community License\nAgreement", "llama3"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", "llama3.1"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "llama3.2"),
        ("LLAMA 3.3 COMMUNITY LICENSE AGREEMENT", "llama3.3"),
        ("LLAMA 4 COMMUNITY LICENSE AGREEMENT", "llama4"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT", "llama2"),
        ("   Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        ("Apache License 1.1", None),
        ("MIT License\n\nCopyright", "mit"),
        ("Gemma Terms of Use", "gemma"),
        ("GNU GENERAL PUBLIC LICENSE", None),
        ("", None),
        ("x" * 600 + "MIT License", None),
    ],
)
def test_a_licence_is_known_by_the_first_lines_of_its_text(text, licence):
    assert licence_in_text(text) == licence


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "llama3"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Llama-3.2-1B", "llama3.2"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3"),
        ("meta-llama/Llama-2-7b-hf", "llama2"),
        ("google/gemma-3-4b-pt", "gemma"),
        ("google/gemma-2b", "gemma"),
        ("google/gemma-4-4b", None),
        ("someone/Meta-Llama-3-8B", None),
        ("Meta-Llama-3-8B", None),
    ],
)
def test_a_licence_is_known_by_the_id_of_its_makers_models(name, licence):
    assert licence_of_id(name) == licence
