package lab

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"sekisho/attest"
)

// pkiLife is how long the lab's certificates are good for.
const pkiLife = 10 * 365 * 24 * time.Hour

// authority is a certificate with its key.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// preparePKI makes, on first use, the organisation's CA, the CA for the
// devices' certificates and the servers' certificates below out/lab/pki, and
// the organisation's configuration. The CA is part of the image, so all of it
// stays as it is until out/ is removed.
func (l *Lab) preparePKI() error {
	if err := errors.Join(l.officePKI(), l.accessPKI(), l.feedPKI()); err != nil {
		return err
	}
	if exist(l.lab("pki", "made")) {
		return l.writeOrganization()
	}
	org, err := l.issue("ca", nil, &x509.Certificate{
		Subject: pkix.Name{Organization: []string{"Sekisho Lab"}, CommonName: "Sekisho Lab organisation CA"},
		IsCA:    true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign})
	if err != nil {
		return err
	}
	if _, err := l.issue("device-ca", &org, &x509.Certificate{
		Subject: pkix.Name{Organization: []string{"Sekisho Lab"}, CommonName: "Sekisho Lab device CA"},
		IsCA:    true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}); err != nil {
		return err
	}
	for file, name := range map[string]string{"verifier": verifierName, "gateway": gatewayName} {
		if _, err := l.issue(file, &org, &x509.Certificate{
			Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
			return err
		}
	}
	// Last: it says that all the rest is there.
	if err := writeFile(l.lab("pki", "made"), nil, 0o644); err != nil {
		return err
	}
	return l.writeOrganization()
}

// feedPKI makes the gateway's certificate for the verifier's stream of
// revocations, and its CA, on first use.
func (l *Lab) feedPKI() error {
	if exist(l.lab("pki", "gateway-client.pem")) {
		return nil
	}
	ca, err := l.issue("gateway-ca", nil, &x509.Certificate{
		Subject: pkix.Name{Organization: []string{labOrganization}, CommonName: "Sekisho Lab gateways CA"},
		IsCA:    true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign})
	if err != nil {
		return err
	}
	_, err = l.issue("gateway-client", &ca, &x509.Certificate{
		Subject:  pkix.Name{CommonName: gatewayName},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err
}

// officePKI makes the office CA and its beacon's certificate on first use.
func (l *Lab) officePKI() error {
	if exist(l.lab("pki", "beacon.pem")) {
		return nil
	}
	ca, err := l.issue("office-ca", nil, &x509.Certificate{
		Subject: pkix.Name{Organization: []string{"Sekisho Lab"}, CommonName: "Sekisho Lab office CA"},
		IsCA:    true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign})
	if err != nil {
		return err
	}
	site, err := url.Parse(attest.SiteURI(officeSite))
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	_, err = l.issue("beacon", &ca, &x509.Certificate{
		Subject: pkix.Name{CommonName: beaconName}, DNSNames: []string{beaconName}, URIs: []*url.URL{site},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return err
}

// writeOrganization writes the configuration that the image is built with.
func (l *Lab) writeOrganization() error {
	ca, err := os.ReadFile(l.lab("pki", "ca.pem"))
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	office, err := os.ReadFile(l.lab("pki", "office-ca.pem"))
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	o := attest.Organization{
		Name: "Sekisho Lab", CA: string(ca),
		Verifiers:  []attest.Endpoint{{Address: verifierAddress, ServerName: verifierName}},
		Gateways:   []attest.Endpoint{{Address: gatewayAddress, ServerName: gatewayName}},
		WorkDomain: attest.WorkDomain{MemoryMiB: 256, VCPUs: 1, Firmware: attest.FirmwareBIOS, Disk: attest.DiskPersistent, Link: l.Link},
	}
	if o.EscrowKey, err = l.publicKey("escrow"); err != nil {
		return err
	}
	if o.NetworkAccess, err = l.networkAccess(); err != nil {
		return err
	}
	if err := l.setLogon(&o); err != nil {
		return err
	}
	o.Office = &attest.Office{
		CA:      string(office),
		Beacons: []attest.Beacon{{Endpoint: attest.Endpoint{Address: beaconAddress, ServerName: beaconName}, Site: officeSite}},
		// An emulated laptop takes its time to answer.
		MaxRoundTripMS: 500,
	}
	o.Updates = &attest.Updates{Threshold: policyThreshold}
	for _, name := range policySigners {
		key, err := l.publicKey(name)
		if err != nil {
			return err
		}
		o.Updates.Keys = append(o.Updates.Keys, key)
	}
	if err := o.Validate(); err != nil {
		return err
	}
	b, err := json.MarshalIndent(o, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(l.OrganizationFile(), append(b, '\n'), 0o644)
}

// signer returns the key out/lab/pki/NAME.key, which is made on first use.
func (l *Lab) signer(name string) (*ecdsa.PrivateKey, error) {
	path := l.lab("pki", name+".key")
	fail := func(err error) (*ecdsa.PrivateKey, error) { return nil, fmt.Errorf("lab: key %s: %w", name, err) }
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return fail(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return fail(err)
		}
		return key, writeFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
	}
	if err != nil {
		return fail(err)
	}
	b, _ := pem.Decode(data)
	if b == nil {
		return fail(errors.New("no PEM"))
	}
	k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		return fail(err)
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return fail(fmt.Errorf("%T, want ECDSA", k))
	}
	return key, nil
}

// publicKey is the public half of a signer in PEM.
func (l *Lab) publicKey(name string) (string, error) {
	key, err := l.signer(name)
	if err != nil {
		return "", err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return "", fmt.Errorf("lab: key %s: %w", name, err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), nil
}

// OrganizationFile is the configuration that the lab's images are built with.
func (l *Lab) OrganizationFile() string { return l.lab("organization.json") }

// issue makes a key and a certificate signed by parent, or by itself, as
// out/lab/pki/NAME.key and NAME.pem.
func (l *Lab) issue(name string, parent *authority, template *x509.Certificate) (authority, error) {
	fail := func(err error) (authority, error) {
		return authority{}, fmt.Errorf("lab: certificate %s: %w", name, err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fail(err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return fail(err)
	}
	now := time.Now()
	template.NotBefore, template.NotAfter = now.Add(-24*time.Hour), now.Add(pkiLife)
	self := authority{cert: template, key: key}
	if parent == nil {
		parent = &self
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent.cert, key.Public(), parent.key)
	if err != nil {
		return fail(err)
	}
	if self.cert, err = x509.ParseCertificate(der); err != nil {
		return fail(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fail(err)
	}
	err = errors.Join(
		writeFile(l.lab("pki", name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644),
		writeFile(l.lab("pki", name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600))
	return self, err
}

// swtpmConfig and localcaConfig make swtpm_setup(8) use the lab's own CA for
// endorsement key certificates.
const (
	swtpmConfig = `create_certs_tool = /usr/bin/swtpm_localca
create_certs_tool_config = %[1]s/localca.conf
create_certs_tool_options = %[1]s/localca.options
active_pcr_banks = sha256
`
	localcaConfig = `statedir = %[1]s
signingkey = %[1]s/signkey.pem
issuercert = %[1]s/issuercert.pem
certserial = %[1]s/certserial
`
	localcaOptions = `--platform-manufacturer Sekisho
--platform-version 1
--platform-model Lab
`
)

// prepareTPM makes a new TPM with an endorsement key certificate of the lab.
func (l *Lab) prepareTPM(run func(argv ...string) error) error {
	ca, tpm := l.lab("swtpm-ca"), l.lab("tpm")
	if err := os.RemoveAll(tpm); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	for _, dir := range []string{ca, tpm} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("lab: %w", err)
		}
	}
	for file, text := range map[string]string{"setup.conf": swtpmConfig, "localca.conf": localcaConfig} {
		if err := writeFile(filepath.Join(ca, file), fmt.Appendf(nil, text, ca), 0o600); err != nil {
			return err
		}
	}
	if err := writeFile(filepath.Join(ca, "localca.options"), []byte(localcaOptions), 0o600); err != nil {
		return err
	}
	return run("swtpm_setup", "--tpm2", "--tpmstate", tpm, "--config", filepath.Join(ca, "setup.conf"),
		"--create-ek-cert", "--pcr-banks", "sha256", "--overwrite", "--logfile", l.lab("swtpm_setup.log"))
}

// ekRoots are the certificates of the CA that prepareTPM uses.
func (l *Lab) ekRoots() []string {
	return []string{l.lab("swtpm-ca", "swtpm-localca-rootca-cert.pem"), l.lab("swtpm-ca", "issuercert.pem")}
}
