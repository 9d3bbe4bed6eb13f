"""`python -m policies` prints the JSON Schema of policy files, as one line."""

import argparse
import json

from policies.schema import policy_file_schema
from policies.version import written_by

parser = argparse.ArgumentParser("python -m policies", description="Print the JSON Schema of policy files.")
parser.add_argument("--version", action="version", version=written_by())
parser.parse_args()
print(json.dumps(policy_file_schema()))
