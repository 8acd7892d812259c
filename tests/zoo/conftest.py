import pytest

from scconv_deploy.zoo import catalogue


@pytest.fixture(scope="session")
def listing():
    """The whole zoo, counted once."""
    return catalogue.list_models()
