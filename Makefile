# For users: `make demo` and `make test`. Most other targets are parts of `make test`.
.PHONY: demo test test-stable test-arm soak check lint types docs c-tests unit packages-tests unit-busy \
	coverage lab-tests lab-tests-1 lab-tests-2 benchmarks integrations integrations-vllm \
	integrations-sglang man schemas clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
OTHERS := .venv-integrations
VLLM := .venv-vllm
SGLANG := .venv-sglang

demo test benchmarks integrations integrations-vllm integrations-sglang: export PIP_DISABLE_PIP_VERSION_CHECK := 1

demo: $(VENV)/ready
	examples/demo.sh

# One part after the other: tests of waiting and of interrupts need the processors for themselves.
test: lint types docs c-tests simulate-test unit packages-tests lab-tests
	@echo "make test: all of it passed"

check: lint types docs c-tests unit

# Not part of `make test`: the lab's tests on Debian stable's kernel, and the long soak.
test-stable: $(VENV)/ready
	tools/install-system-packages $$(lab/run --apt-packages)
	lab/run --kernel stable --devices all -- python3 -m pytest tests/kernel tests/device

# Not part of `make test` either: the tests of devices on each kernel, and the table of devices that
# they prove (docs/reference/devices.md).
.PHONY: test-devices device-table
DEVICE_RUNS := build/devices
IN_GUEST := python3 -m pytest --timeout 600
test-devices: $(VENV)/ready
	tools/install-system-packages $$(lab/run --apt-packages) $$(lab/run --arch arm64 --apt-packages)
	rm -rf $(DEVICE_RUNS)
	for kernel in backports stable; do \
		lab/run --kernel $$kernel --timeout 3600 --devices all --out $(DEVICE_RUNS)/$$kernel -- \
			sh -c '$(IN_GUEST) tests/device && $(IN_GUEST) -m device_table tests/kernel' || exit; \
		lab/run --kernel $$kernel --devices cxl --out $(DEVICE_RUNS)/$$kernel-cxl -- \
			$(IN_GUEST) tests/device/test_cxl.py || exit; \
		lab/run --kernel $$kernel --guests 2 --devices cxl --memory 2G \
			--out $(DEVICE_RUNS)/$$kernel-shared -- \
			$(IN_GUEST) -m device_table tests/guests/test_shared_memory.py || exit; \
	done
	for pages in 4k 16k; do \
		lab/run --arch arm64 --page-size $$pages --timeout 7200 --devices all \
			--out $(DEVICE_RUNS)/arm64-$$pages -- \
			python3 -m pytest --timeout 1800 -m device_table tests/device tests/kernel || exit; \
	done
	DMABUF_DEVICE_TABLE=$(DEVICE_RUNS)/here.json $(BIN)/python -m pytest -m device_table tests/unit
	$(MAKE) -s device-table

device-table: $(VENV)/ready
	$(BIN)/python tools/write_device_table.py $$(find $(DEVICE_RUNS) -name '*.json')

# Not part of `make test` either: the lab's tests on aarch64, with the wheel of a release.
test-arm: $(VENV)/ready
	tools/install-system-packages $$(lab/run --arch arm64 --apt-packages)
	for size in 4k 16k; do \
		lab/run --arch arm64 --page-size $$size --timeout 7200 --devices all \
			--out $(DEVICE_RUNS)/arm64-$$size -- \
			python3 -m pytest --timeout 1800 tests/kernel tests/device || exit; \
	done

TRANSFERS := 100000
soak: $(VENV)/ready
	$(BIN)/python -m tests.soak --count $(TRANSFERS)
	$(BIN)/python -m tests.sharing --count 500
	$(BIN)/python -m tests.restarting --count 1000
	tools/install-system-packages $$(lab/run --apt-packages)
	lab/run --timeout 14400 -- python3 -m tests.soak --count $(TRANSFERS)
	DMABUF_CUTS=100000 lab/run --timeout 14400 -- python3 -m pytest tests/kernel/test_crash_states.py

# Random transfers on a virtual kernel, from a seed: of the package for a quarter of the time, which
# makes fewer, then of the C core alone.
.PHONY: simulate
SECONDS := 60
simulate: $(VENV)/ready
	$(BIN)/python -m tests.simulator --seconds $$(($(SECONDS) / 4)) --seed $(or $(SEED),$$(date +%s)000)
	$(MAKE) -s -C csrc simulate SECONDS=$$(($(SECONDS) * 3 / 4)) $(if $(SEED),SEED=$(SEED))

# In `make test`: the seeds that failed before, and two minutes of new ones, of which `c-tests` runs 30
# seconds.
.PHONY: simulate-test
simulate-test: $(VENV)/ready
	$(BIN)/python -m tests.simulator --seeds tests/simulator/failed-seeds --seconds 600
	$(BIN)/python -m tests.simulator --seconds 45 --seed $$(date +%s)000
	$(MAKE) -s -C csrc simulate SECONDS=45

# Random input for the parsers and the store's server for half of the time, then libFuzzer on the core.
.PHONY: fuzz
fuzz: $(VENV)/ready
	tools/install-system-packages clang libclang-rt-dev
	$(BIN)/python -m tests.fuzz --seconds $$(($(SECONDS) / 2)) --seed $(or $(SEED),$$(date +%s)000)
	$(MAKE) -s -C csrc fuzz SECONDS=$$(($(SECONDS) / 2))

# Analysers and valgrind on the C core.
.PHONY: deep
deep: $(VENV)/ready
	tools/install-system-packages gcc clang cppcheck valgrind
	$(MAKE) -s -C csrc deep

# Faults put into the core and the package, which the simulators have to find; small changes of
# csrc/batch.c, which they should notice.
.PHONY: mutants
mutants: $(VENV)/ready
	$(BIN)/python -m tests.mutants
	$(BIN)/python -m tests.mutants --episodes 5000 csrc/batch.c

# Install missing system packages, and make the virtual environment.
$(VENV)/ready: pyproject.toml setup.py csrc/core.h $(wildcard csrc/*.c csrc/*.h csrc/build_ffi.py csrc/python/*.c)
	tools/install-system-packages gcc libc6-dev libfuse3-dev liburing-dev pkg-config python3-dev python3-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dmabuf needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools setuptools_scm cffi cython
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test,dev,docs,fuse]'
	touch $@

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror csrc/*.[ch] csrc/python/*.c csrc/tests/*.[ch] csrc/tests/simulator/*.[ch] benchmarks/*.c tests/unit/*.[ch] tests/device/*.c docs/kernel-findings/*.c

types: $(VENV)/ready
	$(BIN)/mypy
	$(BIN)/mypy --strict -p lab
	$(BIN)/mypy benchmarks/*.py tools/*.py

# The documentation site: build/site/index.html.
docs: $(VENV)/ready
	$(BIN)/python tools/build_site.py

# The manual pages, from the parsers of the commands.
man: $(VENV)/ready
	$(BIN)/python tools/write_man_pages.py contrib/man

# The JSON Schemas of what --json prints, from the types of the records.
schemas: $(VENV)/ready
	$(BIN)/python tools/write_schemas.py docs/reference/schemas

c-tests: $(VENV)/ready
	$(MAKE) -C csrc test tsan

TESTS := tests/unit
WORKERS := 2
UNIT := -m pytest --numprocesses $(WORKERS) --dist worksteal
UNIT_PACKAGES := fio fuse3 iproute2 openssl rsync systemd xxd
unit: $(VENV)/ready
	tools/install-system-packages $(UNIT_PACKAGES)
	$(BIN)/python $(UNIT) $(TESTS)

# The source distribution and the wheel, each in an empty virtual environment.
packages-tests: $(VENV)/ready
	$(BIN)/python -m pytest tests/packages

# For a release: the source distribution, and wheels for x86-64 and aarch64, in dist/. On Debian 12.
.PHONY: wheels
wheels: $(VENV)/ready
	tools/install-system-packages binutils dpkg
	$(BIN)/python -m pip install --quiet --group wheels
	tools/build-wheels $(BIN)/python

# The unit tests beside eight busy loops and a busy disk.
unit-busy: $(VENV)/ready
	tools/install-system-packages $(UNIT_PACKAGES)
	tests/busy.sh $(BIN)/python $(UNIT) --timeout 1200 $(TESTS)

# The coverage of the unit tests: Python, subprocesses included, and the C core. Its own tests and the
# simulator show which of its branches are taken. test_every_step.py is left out: it forks thousands of
# children, and each would take long to record its coverage.
COVERAGE := $(CURDIR)/build/coverage
COUNTING := CFLAGS="--coverage -fprofile-update=atomic" LDFLAGS=--coverage
coverage: $(VENV)/ready
	tools/install-system-packages $(UNIT_PACKAGES)
	rm -rf $(COVERAGE) $(VENV)/ready
	$(COUNTING) $(BIN)/python setup.py -q build_ext --inplace --force --build-temp $(COVERAGE)/core
	$(COUNTING) DMABUF_TESTS_OBJECTS=$(COVERAGE)/tests $(BIN)/python tests/core.py
	-DMABUF_TESTS_OBJECTS=$(COVERAGE)/tests $(BIN)/coverage run --data-file=$(COVERAGE)/data \
		-m pytest --timeout 1200 $(TESTS) --ignore tests/unit/test_every_step.py
	$(BIN)/coverage combine --quiet --data-file=$(COVERAGE)/data
	$(BIN)/coverage report --data-file=$(COVERAGE)/data >$(COVERAGE)/python.txt
	$(BIN)/gcovr --root . --filter csrc/ --exclude csrc/tests/ --txt $(COVERAGE)/core.txt \
		$(COVERAGE)/core $(COVERAGE)/tests
	rm -rf build/csrc/coverage build/csrc/coverage-simulator
	$(MAKE) -s -C csrc coverage
	$(BIN)/gcovr --root . --object-directory csrc --filter csrc/ --exclude csrc/tests/ \
		--json $(COVERAGE)/core.json build/csrc/coverage build/csrc/coverage-simulator
	$(BIN)/python tests/branches.py $(COVERAGE)/core.json >$(COVERAGE)/branches.txt || true
	$(MAKE) $(VENV)/ready
	@echo "Python, lines and branches: build/coverage/python.txt"; tail -n 1 $(COVERAGE)/python.txt
	@echo "C core, lines: build/coverage/core.txt"; tail -n 2 $(COVERAGE)/core.txt
	@echo "C core, branches that its own tests take: build/coverage/branches.txt"; tail -n 1 $(COVERAGE)/branches.txt

# Two guests, of which each takes about half of the time.
LAB_TESTS_1 := $(wildcard tests/kernel/test_[a-f]*.py)
FABRICS := tests/kernel/test_nvme_fabrics.py
# CXL memory goes with none of the other devices: `make test-devices` has a run for it.
LAB_TESTS_2 := $(filter-out $(LAB_TESTS_1) $(FABRICS),$(wildcard tests/kernel/test_*.py)) tests/device \
	--ignore=tests/device/test_cxl.py
lab-tests: lab-tests-1 lab-tests-2

lab-tests-1 lab-tests-2: lab-tests-%: $(VENV)/ready
	tools/install-system-packages $$(lab/run --apt-packages)
	lab/run --timeout 2700 --devices all -- python3 -m pytest --timeout 600 $(LAB_TESTS_$*)

# Not part of `make test`: NVMe over TCP in one guest; then tests between two guests, of which one
# loses its power and boots again, and which have RDMA and the memory of an nvdimm; then the memory
# of a CXL device, which no guest has beside an nvdimm.
.PHONY: test-guests
test-guests: $(VENV)/ready
	tools/install-system-packages $$(lab/run --apt-packages)
	lab/run --devices nvmf -- python3 -m pytest --timeout 600 $(FABRICS)
	lab/run --guests 2 --devices nvmf,dax,rdma --memory 2G -- python3 -m pytest --timeout 600 tests/guests
	lab/run --guests 2 --devices cxl --memory 2G -- python3 -m pytest --timeout 600 tests/guests/test_shared_memory.py

# Other loaders side by side: takes minutes, downloads 2 GiB, and needs 5 GiB of disk and, as root,
# 10 GiB of memory.
benchmarks: $(PEERS)/ready
	$(PEERS)/bin/python benchmarks/beside_peers.py

$(PEERS)/ready: benchmarks/requirements.txt benchmarks/requirements-kvikio.txt pyproject.toml
	tools/install-system-packages gcc g++ libc6-dev liburing-dev libaio-dev python3-dev python3-venv fio strace
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -c benchmarks/requirements.txt setuptools cffi torch
	DS_BUILD_OPS=0 $(PEERS)/bin/python -m pip install --quiet --no-build-isolation -r benchmarks/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps -r benchmarks/requirements-kvikio.txt
	$(PEERS)/bin/python -m pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

# The plug-ins in the libraries that they are for: takes minutes, and downloads 1 GiB.
integrations: $(OTHERS)/ready
	$(OTHERS)/bin/python -m pytest tests/integrations $(IN_TORCH)

# 3.5 GB more: vLLM's build for CPUs, in a virtual environment of its own.
integrations-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest tests/integrations/test_vllm.py

# 6 GB more: SGLang, with the PyTorch for CUDA that it needs also on a CPU.
integrations-sglang: $(SGLANG)/ready
	$(SGLANG)/bin/python -m pytest tests/integrations/test_sglang.py

IN_TORCH := $(addprefix tests/unit/test_,arrays_torch.py checkpoint.py formats.py kvikio.py nixl.py safetensors_torch.py sending.py)

$(OTHERS)/ready: $(wildcard tests/integrations/requirements*.txt) benchmarks/requirements-kvikio.txt pyproject.toml setup.py csrc/core.h $(wildcard csrc/*.c csrc/*.h)
	tools/install-system-packages gcc libc6-dev liburing-dev python3-dev python3-venv
	test -x $(OTHERS)/bin/python || $(PYTHON) -m venv $(OTHERS)
	$(OTHERS)/bin/python -m pip install --quiet setuptools cffi
	$(OTHERS)/bin/python -m pip install --quiet -r tests/integrations/requirements.txt
	$(OTHERS)/bin/python -m pip install --quiet --no-deps -r benchmarks/requirements-kvikio.txt
	$(OTHERS)/bin/python -m pip install --quiet --no-deps -r tests/integrations/requirements-alone.txt
	$(OTHERS)/bin/python -m pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

$(VLLM)/ready: tests/integrations/requirements-vllm.txt pyproject.toml setup.py csrc/core.h $(wildcard csrc/*.c csrc/*.h)
	tools/install-system-packages gcc libc6-dev liburing-dev python3-dev python3-venv
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet -r tests/integrations/requirements-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(VLLM)/bin/python -m pip install --quiet ml_dtypes pytest pytest-timeout hypothesis trio
	touch $@

$(SGLANG)/ready: tests/integrations/requirements-sglang.txt pyproject.toml setup.py csrc/core.h $(wildcard csrc/*.c csrc/*.h)
	tools/install-system-packages gcc libc6-dev liburing-dev python3-dev python3-venv
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --quiet setuptools cffi -r tests/integrations/requirements-sglang.txt
	$(SGLANG)/bin/python -m pip install --quiet --no-deps sglang==0.5.23
	$(SGLANG)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(SGLANG)/bin/python -m pip install --quiet ml_dtypes pytest pytest-timeout hypothesis trio
	touch $@

clean:
	rm -rf build $(VENV) $(PEERS) $(OTHERS) $(VLLM) $(SGLANG) .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name '*.so' -path './src/*' -delete
