"""`python -m policies` prints the JSON Schema of policy files, as one line."""

import json

from policies.schema import policy_file_schema

print(json.dumps(policy_file_schema()))
