"""What was found on held-out items, in words (training -> terminal, report)."""

from collections.abc import Iterator, Mapping


def verdict(judged: Mapping[str, float]) -> Iterator[str]:
    """Yield lines about what ``held_out.judge`` found."""
    if "text_loss" in judged:
        yield (
            f"held-out tokens: {judged['text_accuracy']:.1%} right (most frequent token: "
            f"{judged['text_accuracy_unigram']:.1%}), loss {judged['text_loss']:.3f} (unigram: "
            f"{judged['text_loss_unigram']:.3f})"
        )
    if "image_loss_unigram" in judged:
        yield (
            f"held-out patches: {judged['image_accuracy']:.1%} of the codes right (most frequent "
            f"code of training: {judged['image_accuracy_unigram']:.1%}), loss "
            f"{judged['image_loss']:.3f} (unigram of training: {judged['image_loss_unigram']:.3f})"
        )
    elif "image_loss_entropy" in judged:
        yield (
            f"held-out patches: {judged['image_accuracy']:.1%} of the codes right (most frequent "
            f"of these codes: {judged['image_accuracy_most_frequent']:.1%}), loss "
            f"{judged['image_loss']:.3f} (entropy of these codes: "
            f"{judged['image_loss_entropy']:.3f})"
        )
    elif "image_loss" in judged:
        yield (
            f"held-out patches: squared error {judged['image_loss']:.4f} (mean patch: "
            f"{judged['image_loss_mean_patch']:.4f})"
        )
