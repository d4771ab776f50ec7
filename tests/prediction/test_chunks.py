"""Chunks keep complete files only, share images among ranks, and resume the same prediction alone."""

import pytest

from shunted_lit.prediction.chunks import Chunks


@pytest.fixture
def make_chunks(tmp_path):
    """Return a function that opens the chunks of 21 images, as each process does."""

    def make(world_size=1, **settings):
        chunks = Chunks(tmp_path / "chunks", 21, {"weights": "a", **settings})
        chunks.start(world_size)
        chunks.load()
        return chunks

    return make


def write(chunks, images):
    for image in images:
        chunks.write(image, {"image": image})


def test_interrupted_run_resumes_with_another_number_of_ranks(make_chunks):
    chunks = make_chunks()
    write(chunks, chunks.remaining_images(0, 1)[:8])
    chunks.release()
    assert (chunks.size, len(chunks.all_chunks), chunks.count_complete()) == (3, 7, 2), "the third is not complete"
    chunks = make_chunks(world_size=2)
    ranks = [chunks.remaining_images(rank, 2) for rank in (0, 1)]
    assert sorted([*ranks[0], *ranks[1]]) == list(range(6, 21))
    for images in ranks:
        write(chunks, images)
    assert [record["image"] for record in chunks] == list(range(21))
    assert chunks.remaining_images(0, 1) == []
    chunks.remove()
    assert not chunks.folder.exists()


def test_other_settings_are_rejected(make_chunks):
    make_chunks(min_score=0.3).release()
    with pytest.raises(ValueError, match=r"started with min_score 0\.3, now it is 0\.5; remove this folder to start"):
        make_chunks(min_score=0.5)


def test_damaged_folder_is_rejected(make_chunks):
    chunks = make_chunks()
    chunks.origin.write_text("{")
    with pytest.raises(ValueError, match=r"chunks: damaged, cannot be resumed .*; remove this folder"):
        chunks.load()


def test_folder_of_a_running_process_is_rejected(make_chunks):
    chunks = make_chunks()
    with pytest.raises(ValueError, match=r"chunks.*another process"):
        make_chunks()
    chunks.release()
    make_chunks().release()


def test_chunk_must_be_written_from_its_first_image(make_chunks):
    with pytest.raises(ValueError, match="from its first one, 3, got 4"):
        make_chunks().write(4, {})
