# make run   build everything, boot the laptop in the virtual lab, show the page
# make test  every test, the real boots among them
# make bench measurements for docs/performance.md
# make fuzz  every fuzz target for FUZZTIME (default 10m), two at a time
# Both install what they lack (Debian, as root); the logic is in Go: bin/lab, bin/mkimage.
SHELL    := /bin/bash
GO       := GOTOOLCHAIN=local CGO_ENABLED=0 go
COMMANDS := $(patsubst %/main.go,./%,$(wildcard */cmd/*/main.go images/lab/cmd/lab/main.go))
VENDORS  := ../shared/corpus/attest/vendor-roots
# Everything make run and make test start that is not in this repository.
PACKAGES := ca-certificates iproute2 nftables procps kmod qemu-system-x86 ovmf swtpm swtpm-tools \
            dnsmasq-base sbsigntool syslinux syslinux-common mtools dosfstools tcpdump
# Real clients of the smart card, and the fingerprint reader (hostos/login).
bench: PACKAGES += openvpn
test: PACKAGES += pcscd opensc vsmartcard-vpcd dbus-daemon fprintd krb5-kdc krb5-admin-server krb5-user krb5-pkinit openssh-client openssh-server
test: PACKAGES += wine wine64 systemd hostapd wpasupplicant

.PHONY: run test bench fuzz build packages vet clean
run: packages build
	@bin/lab run

test: packages vet build
	@set -o pipefail; echo "== unit and privileged tests"; \
	 SEKISHO_TEST=all $(GO) test -timeout 20m $$($(GO) list ./... | grep -v '/images/lab$$') && \
	 SEKISHO_TEST=all $(GO) test -tags lab ./hostos/boot ./images/work || { echo "make test: FAIL"; exit 1; }
	@echo "== the laptop in the lab: real boots"; \
	 SEKISHO_TEST=all $(GO) test -count=1 -timeout 40m -v ./images/lab || { echo "make test: FAIL"; exit 1; }
	@echo "make test: PASS"

bench: packages build
	@echo "== attestation against its yardsticks"; $(GO) test ./attest/eventlog ./attest/quote ./attest/tpm -run '^$$' -bench Ratio
	@echo "== whole verifications over TLS"; $(GO) test ./attest/fleet -run '^$$' -bench Load -benchtime 1x -count 3
	@echo "== the smart card against swtpm's bare signatures"; SEKISHO_TEST=all $(GO) test ./images/lab -run '^$$' -bench CardRatio -benchtime 300x
	@echo "== a login storm"; $(GO) test ./attest/fleet -run '^$$' -bench Storm -benchtime 1x
	@echo "== guest link against its yardsticks"; set -o pipefail; $(GO) test ./guestlink/packet -run '^$$' -bench Ratio -benchtime 1x -v | grep -v '^goos\|^goarch\|^pkg' && \
	 SEKISHO_TEST=all $(GO) test ./guestlink/guest -run '^$$' -bench Ratio -benchtime 1x -v | grep -v '^goos\|^goarch\|^pkg'
	@echo "== the tunnel against wireguard-go and OpenVPN"; SEKISHO_TEST=all $(GO) test ./netd/internal/e2e -run '^$$' -bench 'Tunnel|GatewayMemory' -benchtime 5x
	@echo "== moves between networks, and netd's memory"; SEKISHO_TEST=all $(GO) test ./netd/internal/e2e -run '^$$' -bench Moves -benchtime 3x
	@bin/lab bench

FUZZTIME ?= 10m
fuzz:
	@grep -rHo '^func Fuzz[[:alnum:]]*' --include=*_test.go attest guestlink hostos images netd | \
	 sed -E 's#^(.*)/[^/]*:func #./\1 #' | xargs -P 2 -L 1 bash -o pipefail -c 'echo "== $$0 $$1"; \
	   $(GO) test $$0 -run "^$$" -fuzz "^$$1\$$" -fuzztime $(FUZZTIME) -parallel 1 | grep -E "execs|^(---|FAIL|ok| )" | tail -3 || exit 255'

# The certificates of TPM makers are data beside the repository: where they are,
# they take the place of the empty attest/ek/bundle.pem (docs/attest.md).
build:
	@echo "== building bin/"; mkdir -p bin out; \
	 if [ -d $(VENDORS) ]; then \
	   $(GO) run ./attest/cmd/attestctl ek bundle -from $(VENDORS) -out out/ek-roots.pem && \
	   echo '{"Replace": {"$(CURDIR)/attest/ek/bundle.pem": "$(CURDIR)/out/ek-roots.pem"}}' > out/overlay.json; \
	 else \
	   echo "$(VENDORS) is absent: no certificates of TPM makers are built in; attestctl ek needs -roots"; \
	   echo '{}' > out/overlay.json; \
	 fi && $(GO) build -trimpath -overlay out/overlay.json -o bin/ $(COMMANDS)

vet:
	@echo "== go vet (linux, windows)"; $(GO) vet ./... && $(GO) vet -tags lab ./... && GOOS=windows $(GO) vet ./guestlink/...

packages:
	@[ "$$(id -u)" = 0 ] || { echo "make: run as root: the lab makes network namespaces"; exit 1; }
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${db:Status-Abbrev}' $$p 2>/dev/null | grep -q '^ii' || echo $$p; done); \
	 [ -z "$$missing" ] || { echo "== installing" $$missing; apt-get update -qq && \
	 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; }

clean:
	@[ ! -x bin/lab ] || bin/lab down || true
	@rm -rf bin out
