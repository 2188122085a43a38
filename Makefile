# PYTHON names the interpreter; what it lacks is installed into .venv, or into its own virtual environment.
PYTHON ?= python3
export TORCH_SPEC

ENVIRONMENT = "$(PYTHON)" .ci/environment.py

.PHONY: help demo train test test-all lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      segment photos and microscope pictures, results in results/demo"
	@echo "make train     train a small model on the sample pictures, results in results/train: some minutes"
	@echo "make test      style, types and tests: some minutes"
	@echo "make test-all  the same and the slow tests"
	@echo "make lint      style and types alone"
	@echo "make clean     remove .venv, results, caches and build folders"
	@echo
	@echo "Packages that the machine has are used; missing ones are installed into .venv."
	@echo "PYTHON=...     another interpreter; one of a virtual environment is used as it is"
	@echo "TORCH_SPEC=... what pip gets where PyTorch is missing, for example torch==2.9.1"

NUCLEI = demo/models/nuclei.safetensors

demo:
	@start="$$(date +%s)" && python="$$($(ENVIRONMENT) requirements.txt)" && \
	echo "== photos" && \
	"$$python" demo/demo.py --model panoptic --input demo/pictures --output results/demo/photos && \
	if [ -f $(NUCLEI) ]; then \
		echo "== microscope pictures" && \
		"$$python" demo/demo.py --model nuclei --input demo/pictures/microscope --output results/demo/microscope; \
	else \
		echo "== no microscope pictures: this copy of the repository lacks $(NUCLEI)"; \
	fi && \
	echo "== $$(($$(date +%s) - start)) s in all; look at $$(ls results/demo/*/contact_sheet.png | tr '\n' ' ')"

train:
	@python="$$($(ENVIRONMENT) requirements.txt requirements-train.txt)" && \
	"$$python" train_net.py --engine embedded --config-file configs/quick_schedules/sample_minutes.yaml \
		--resume OUTPUT_DIR results/train

lint:
	@python="$$($(ENVIRONMENT) requirements.txt requirements-train.txt requirements-dev.txt)" && $(LINT)

test:
	@python="$$($(ENVIRONMENT) requirements.txt requirements-train.txt requirements-dev.txt)" && $(LINT) && $(KERNELS) && $(call PYTEST,not slow)

test-all:
	@python="$$($(ENVIRONMENT) requirements.txt requirements-train.txt requirements-dev.txt)" && $(LINT) && $(KERNELS) && $(call PYTEST,)

LINT = echo "== style: ruff" && "$$python" -m ruff check . && echo "== types: mypy" && "$$python" -m mypy

# Built where there is a compiler, and again only when something has changed.
KERNELS = echo "== kernels" && "$$python" .ci/build_kernels.py

# In as many processes as there are cores, each of which computes with one thread. The last lines say what was skipped and why.
PYTEST = echo "== tests: pytest" && \
	{ "$$python" -m pytest -q -m "$(1)" --numprocesses auto --maxprocesses 8 --dist worksteal; code=$$?; "$$python" .ci/environment.py --detectron2; exit $$code; }

clean:
	rm -f mask2former/_C.*.so mask2former/ops/_build_record.txt
	rm -rf .venv results/demo results/train build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find mask2former tests demo .ci -name __pycache__ -type d -prune -exec rm -rf {} +
