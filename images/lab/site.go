package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"sekisho/attest"
	"sekisho/images/disk"
)

// site.go runs the organisation's servers as an administrator would: by their
// configuration files and command lines.

// startSite makes a new, empty registry, writes the servers' configuration and
// starts them.
func (l *Lab) startSite(ctx context.Context, b Boot) error {
	dir := l.lab("site")
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	keys, err := l.policyKeys()
	if err != nil {
		return err
	}
	if err := writeJSON(l.lab("verifier.json"), l.verifierConfig(b, keys)); err != nil {
		return err
	}
	if err := writeJSON(l.lab("gateway.json"), map[string]any{
		"listen": gatewayAddress, "certificate": l.lab("pki", "gateway.pem"), "key": l.lab("pki", "gateway.key"),
		"client_ca": l.lab("pki", "device-ca.pem"), "pool": innerPool, "pool6": innerPool6, "leases": filepath.Join(dir, "leases.json"),
		"tun": "sekisho0", "lgwan": "lgwan0", "status": filepath.Join(runDir, "gateway.sock"),
		"revocations": map[string]any{
			"verifiers": []attest.Endpoint{{Address: verifierAddress, ServerName: verifierName}}, "organization": labOrganization,
			"ca": l.lab("pki", "ca.pem"), "certificate": l.lab("pki", "gateway-client.pem"), "key": l.lab("pki", "gateway-client.key"), "signer": l.reportKey(),
		},
	}); err != nil {
		return err
	}
	if err := l.StartVerifier(ctx); err != nil {
		return err
	}
	if err := l.publishPolicy(ctx, b); err != nil {
		return err
	}
	key, err := l.attestctl(ctx, nil, "report", "key")
	if err != nil {
		return err
	}
	if err := writeFile(l.reportKey(), key, 0o644); err != nil {
		return err
	}
	return l.StartGateway(ctx)
}

// reportKey is the file of the key that the verifier's reports are verified by.
func (l *Lab) reportKey() string { return l.lab("site", "report.pub") }

// labOrganization is whose laptop it is.
const labOrganization = "Sekisho Lab"

// verifierConfig is the verifier's configuration: it accepts what a policy of
// those keys says, and the lab's TPMs are the only ones.
func (l *Lab) verifierConfig(b Boot, policyKeys []string) map[string]any {
	life := b.Life
	if life == 0 {
		life = 10 * time.Minute
	}
	return map[string]any{
		"id": verifierName, "organization": labOrganization, "listen": verifierAddress, "admin_socket": l.adminSocket(),
		"certificate": l.lab("pki", "verifier.pem"), "key": l.lab("pki", "verifier.key"),
		"ca_certificate": l.lab("pki", "device-ca.pem"), "ca_key": l.lab("pki", "device-ca.key"),
		"network_ca_certificate": l.lab("pki", "network-ca.pem"), "network_ca_key": l.lab("pki", "network-ca.key"),
		"ek_roots": l.ekRoots(), "policy_keys": policyKeys, "policy_threshold": policyThreshold,
		"gateway_ca": l.lab("pki", "gateway-ca.pem"), "store": l.lab("site", "registry"), "escrow": true, "approvers": l.approversFile(), "certificate_lifetime": life.String(),
	}
}

func (l *Lab) adminSocket() string { return filepath.Join(runDir, "verifier.sock") }

// StartVerifier starts the verifier with the registry that is there.
func (l *Lab) StartVerifier(ctx context.Context) error {
	if _, err := l.start(spec{name: "verifier", namespace: "sekisho-site",
		argv: []string{l.bin("verifier"), "serve", "-config", l.lab("verifier.json")}}); err != nil {
		return err
	}
	return l.listening(ctx, "verifier", "sekisho-site", verifierAddress.String())
}

// StartGateway starts the gateway with the leases that are there.
func (l *Lab) StartGateway(ctx context.Context) error {
	if _, err := l.start(spec{name: "gateway", namespace: "sekisho-site",
		argv: []string{l.bin("gateway"), "serve", "-config", l.lab("gateway.json")}}); err != nil {
		return err
	}
	return l.listening(ctx, "gateway", "sekisho-site", gatewayAddress.String())
}

// Kill ends a process of the surroundings without warning (SIGKILL).
func (l *Lab) Kill(ctx context.Context, name string) error {
	p, err := l.find(name)
	if err != nil {
		return err
	}
	if err := p.kill(syscall.SIGKILL); err != nil {
		return err
	}
	return p.wait(ctx)
}

// placeTicket writes a new enrolment ticket into the disk's state partition, as
// a laptop is handed out.
func (l *Lab) placeTicket(ctx context.Context, image string) error {
	ticket, err := l.attestctl(ctx, nil, "ticket", "create", "-uses", "1", "-expires", "1h")
	if err != nil {
		return err
	}
	offset, _, err := disk.Find(image, disk.State)
	if err != nil {
		return err
	}
	_, err = l.attestctl(ctx, ticket, "ticket", "write", "-state", image, "-offset", strconv.FormatInt(offset, 10))
	return err
}

// attestctl runs the administrator's command and returns its output.
func (l *Lab) attestctl(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, l.bin("attestctl"), append([]string{"-socket", l.adminSocket()}, args...)...)
	var stderr bytes.Buffer
	c.Stdin, c.Stderr = bytes.NewReader(stdin), &stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("lab: attestctl %s: %w: %s", args, err, stderr.Bytes())
	}
	return out, nil
}
