"""Training of adapters and denoisers on folders of pictures."""

from cmlora.adapters.training.pictures import Example as Example
from cmlora.adapters.training.pictures import read_folder as read_folder
from cmlora.adapters.training.settings import Settings as Settings
from cmlora.adapters.training.trainer import Outcome as Outcome
from cmlora.adapters.training.trainer import Trainer as Trainer
from cmlora.adapters.training.trainer import train as train
