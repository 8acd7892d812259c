"""One report of a real run."""

import pytest


@pytest.fixture(scope="session")
def real_report(tiny_reference, tiny_bytes):
    """TinyNet exported and verified on noise."""
    import onnx

    from scconv_deploy.verification.parity import Artifact, verify_onnx
    from scconv_deploy.verification.samples import noise_samples

    reference, log = tiny_reference
    data = tiny_bytes[0]
    samples = noise_samples(reference.signature, 0)
    artifact = Artifact(onnx.load_model_from_string(data), "model.onnx", data)
    return verify_onnx(reference, artifact, samples, log)
