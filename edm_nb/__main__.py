"""`python -m edm_nb` is `edm-nb`."""
from edm_nb.cli import main

if __name__ == "__main__":
    main()
