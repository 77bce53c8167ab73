# Each target sets up .venv when it is missing or out of date, then does its job. `make` alone lists them.
PYTHON ?= python3
BIN = .venv/bin
INSTALLED = .venv/.installed
# how long a target has taken since its shell's `start=$$(date +%s)`
TOOK = echo "$@ took $$(( ($$(date +%s) - start) / 60 )) min $$(( ($$(date +%s) - start) % 60 )) s"

.DEFAULT_GOAL = help
.PHONY: help demo test lab export clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1  /p' Makefile | awk '{ printf "  make %-7s", $$2; $$1 = $$2 = ""; print }'

demo: $(INSTALLED) ## train, sample, evaluate and report a small study on digits: runs/demo/report.html
	@start=$$(date +%s); $(BIN)/diffusevae study demo --out runs/demo; status=$$?; $(TOOK); exit $$status

test: $(INSTALLED) ## run every lesson once, then the tests of whole runs; CHANGED=1 repeats only what could have changed
	@$(BIN)/python .ci/test.py $(if $(CHANGED),--changed)

lab: $(INSTALLED) ## open JupyterLab on the notebooks
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(BIN)/jupyter lab nbs

export: $(INSTALLED) ## write the package, the notebooks' outputs and README.md anew
	@start=$$(date +%s); $(BIN)/python .ci/notebooks.py export; status=$$?; $(TOOK); exit $$status

clean: ## delete what builds and tests leave behind; .venv, runs and data stay
	@rm -rf build dist .pytest_cache .seconds.json .stamps.json
	@find diffusevae nbs tests .ci -name __pycache__ -type d -prune -exec rm -rf {} +
	@find nbs -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is %d.%d; say make PYTHON=python3.11, for example" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	@echo "setting up .venv (several GB the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
