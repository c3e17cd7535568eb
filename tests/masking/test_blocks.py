import torch

from clip_pgs.masking.blocks import in_blocks

IMAGE = 2**18  # numbers, of which a block holds twice as many


def test_large_batches_are_cut_into_blocks_and_put_together_in_order():
    sizes = []

    def double(images, offset, absent):
        assert absent is None
        sizes.append(len(images))
        return 2 * images[:, :1] + offset

    images = torch.arange(5.0)[:, None].expand(5, IMAGE)
    offset = torch.arange(5.0)[:, None] / 10
    result = in_blocks(double, images, offset, None)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(result, 2 * images[:, :1] + offset)


def test_a_batch_that_fits_a_block_stays_whole():
    assert in_blocks(lambda images: images[:1], torch.zeros(2, IMAGE)).shape == (1, IMAGE)


def test_an_image_larger_than_a_block_is_one():
    sizes = []
    in_blocks(lambda images: sizes.append(len(images)) or images, torch.zeros(2, 3 * IMAGE))
    assert sizes == [1, 1]


def test_other_devices_keep_the_batch_whole():
    images = torch.zeros(5, IMAGE, device="meta")
    assert in_blocks(lambda whole: whole[:1], images).shape == (1, IMAGE)


def test_a_compiled_batch_stays_whole():
    compiled = torch.compile(
        lambda images: in_blocks(lambda x: x[:1], images), backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(5, IMAGE)).shape == (1, IMAGE)


def test_no_images_give_no_result():
    assert in_blocks(lambda images: images + 1, torch.zeros(0, 3)).shape == (0, 3)
