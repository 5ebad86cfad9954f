# Every target works from any folder, twice in a row, as root or not. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
NB ?= nbs/*.ipynb nbs/solutions/*.ipynb
FUZZ ?= 50000

.PHONY: help venv demo test test-ci test-all test-avx2 bench gpu peers fuzz lab notebooks lines book course edition

help:            ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

venv:
	@$(PYTHON) tools/make_venv.py '$(TORCH)'

demo: venv       ## fetch the small model and let it answer a question
	@$(BIN)/nano-vllm chat "What is the capital of France, and what is it known for?"

TEST_ENV := HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
# what computes differently on a processor without AVX-512
KERNEL_TESTS := $(addprefix tests/,test_attention.py test_bfloat16.py test_cpu_attention.py test_cpu_kernels.py test_cpu_products.py test_cpu_steps.py test_layers.py \
	test_int4.py test_quantization.py test_triton_attention.py)
KERNEL_NOTEBOOKS := $(wildcard nbs/*_cpu_*.ipynb nbs/*_bfloat16.ipynb nbs/*_quantization.ipynb nbs/*_four_bits.ipynb)
# both cores at work: two notebooks or two groups of tests at a time, each with a thread
# (the solutions run in tests/test_exercises.py, which also looks at what they print)
run_notebooks = $(TEST_ENV) $(2) TRITON_INTERPRET=1 $(BIN)/python tools/test_notebooks.py $(1)
run_tests = $(TEST_ENV) $(1) $(BIN)/python -m pytest -n 2 --dist loadfile

test: export NANO_VLLM_TEST_START := $(shell date +%s)
test: venv       ## the export is in sync, every notebook runs, pytest passes
	$(BIN)/python tools/check_export.py
	$(call run_notebooks,$(wildcard nbs/*.ipynb))
	$(call run_tests)

test-ci: venv    ## what CI runs besides: the tests that take seconds, and are seldom the only ones to fail (ten minutes)
	$(call run_tests) -m "ci and not slow"

test-all: venv   ## the same with all tests, those that take minutes as well
	$(BIN)/python tools/check_export.py
	$(call run_notebooks,$(wildcard nbs/*.ipynb))
	$(call run_tests) -m ""

test-avx2: venv  ## what touches kernels, as on a processor that has AVX2 and no more
	$(call run_notebooks,$(KERNEL_NOTEBOOKS),$(AVX2))
	$(call run_tests,$(AVX2)) -m "not slow" $(KERNEL_TESTS)

bench: venv      ## this engine on this machine: throughput, waits, memory, into results/ (five minutes)
	$(BIN)/python tools/bench.py

gpu:             ## tests and measurements on this machine's GPU, about 8 minutes: PARTS="kernels throughput" for some of it, PARTS=--toy to try it without a GPU
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu_suite.py $(PARTS)

peers: venv      ## this engine beside vLLM and llama.cpp on this machine, 20 minutes (the first time it fetches several GB, and compiles for ten minutes)
	$(BIN)/python tools/peers.py

fuzz: venv       ## the fuzz tests for longer: FUZZ=number of workloads
	NANO_VLLM_FUZZ=$(FUZZ) $(BIN)/python -m pytest -m "not slow" -k fuzz --timeout 0

lab: venv        ## open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab --allow-root --notebook-dir nbs

notebooks: venv  ## execute the notebooks in place and clean them: NB=nbs/02_tokenizer.ipynb for one, RECORD=1 to measure anew
	TRITON_INTERPRET=1 NANO_VLLM_RECORD=$(RECORD) $(BIN)/python tools/run_notebooks.py $(NB)

lines: venv      ## count the exported lines and write them into README.md; write api.qmd and llms.txt
	@$(BIN)/python tools/count_lines.py
	@$(BIN)/python tools/write_pages.py

edition: venv    ## measure and execute all chapters on this machine, idle, for one commit (an hour; can be interrupted): ARGS=--status tells where it stands
	@$(BIN)/python tools/edition.py $(ARGS)

course: venv     ## write assignments for nbgrader into course/: source and release
	@$(BIN)/python tools/make_course.py

book:            ## render the book into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make book: no quarto on the PATH; it is a program of its own, see https://quarto.org/docs/get-started" >&2; exit 1; }
	@mkdir -p build
	@quarto render 2> build/quarto.log; status=$$?; cat build/quarto.log >&2; exit $$status
	@! grep -nE 'WARN|ERROR' build/quarto.log || { echo "make book: each of the lines above has to go" >&2; exit 1; }
	@! grep -rnoE --include='*.html' '\?@?(sec|fig|tbl|eq)-[a-z0-9-]+' _docs || { echo "make book: the references above lead nowhere" >&2; exit 1; }
	@! grep -rlE --include='*.html' 'quarto-uncaptioned' _docs || { echo "make book: the pages above have a figure of several pictures without fig-subcap" >&2; exit 1; }
