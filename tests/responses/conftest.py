"""A gateway in front of a scripted engine, for every test of this directory."""

from gatewayfixtures import fake as fake
from gatewayfixtures import gateway as gateway
from gatewayfixtures import model_dir as model_dir
from gatewayfixtures import store as store
from gatewayfixtures import strict as strict
