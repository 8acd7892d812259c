import pytest

from scconv_deploy.zoo import catalogue
from tests.made_once import once


@pytest.fixture(scope="session")
def listing():
    """The whole zoo, counted once."""
    return once("zoo", catalogue.list_models)
