package fleet

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/cryptrec"
	"sekisho/attest/ek"
	"sekisho/attest/store"
	"sekisho/attest/verifier"
)

// maxConfig bounds any file that the configuration names, in bytes.
const maxConfig = 1 << 20

// builtInRoots in ek_roots stands for the makers' certificates that the
// verifier was built with.
const builtInRoots = "built-in"

// defaultLifetime is a certificate's when the configuration names none.
const defaultLifetime = 10 * time.Minute

// ServerConfig is the configuration file of the verifier. Paths are relative
// to the working directory.
type ServerConfig struct {
	Listen        string `json:"listen"`         // address and port; not used with LISTEN_FDS
	ID            string `json:"id"`             // our name; the server certificate must be valid for it
	Organization  string `json:"organization"`   // in the certificates that we issue
	Certificate   string `json:"certificate"`    // PEM file: server certificate and chain
	Key           string `json:"key"`            // PEM file
	CACertificate string `json:"ca_certificate"` // PEM file: CA of the devices' certificates
	CAKey         string `json:"ca_key"`         // PEM file

	// NetworkCACertificate and NetworkCAKey are PEM files: CA of the laptops'
	// identities for networks with 802.1X. Absent: they get none.
	NetworkCACertificate string `json:"network_ca_certificate"`
	NetworkCAKey         string `json:"network_ca_key"`
	NetworkDays          int    `json:"network_days"` // that such an identity lasts; 90, if absent

	Store               string      `json:"store"`                // directory: of the embedded etcd, reports, and keys
	Etcd                *EtcdConfig `json:"etcd"`                 // an external cluster, in place of the embedded one
	Escrow              bool        `json:"escrow"`               // keep the recovery keys of laptops in escrow; without, laptops make no disk
	EKRoots             []string    `json:"ek_roots"`             // PEM files, or "built-in": whose TPMs may enrol
	ReferenceValues     []string    `json:"reference_values"`     // JSON files; more by attestctl
	CertificateLifetime string      `json:"certificate_lifetime"` // such as "10m"
	GatewayCA           string      `json:"gateway_ca"`           // PEM file: CA of the gateways' client certificates, who hear of revocations
	Approvers           string      `json:"approvers"`            // PEM file: public keys of those who sign permits, two of them each
	Metrics             string      `json:"metrics"`              // address of the metrics for Prometheus, ":9464" on loopback; none, if absent
	AdminSocket         string      `json:"admin_socket"`         // unix socket for attestctl

	NonceKey           string   `json:"nonce_key"`            // file, shared by the organisation's verifiers; made on first use
	ReportKey          string   `json:"report_key"`           // PEM file that signs results and reports; made on first use
	LogKey             string   `json:"log_key"`              // file: key that signs the log of reports; made on first use
	PolicyKeys         []string `json:"policy_keys"`          // PEM files: whose policies are accepted; given: nothing is affirmed without a policy
	PolicyThreshold    int      `json:"policy_threshold"`     // how many of them must sign; all, if absent
	ReportDays         int      `json:"report_days"`          // how long reports are kept; 90, if absent
	ReportGiB          int      `json:"report_gib"`           // and how much of them; 16, if absent
	MassRefusalPercent int      `json:"mass_refusal_percent"` // of enrolled devices within a minute; 5, if absent
}

// ParseServerConfig reads a ServerConfig; unknown fields are errors.
func ParseServerConfig(data []byte) (*ServerConfig, error) {
	if len(data) > maxConfig {
		return nil, fmt.Errorf("configuration: %d bytes, at most %d", len(data), maxConfig)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var c ServerConfig
	if err := d.Decode(&c); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("configuration: data after the document")
	}
	var errs []error
	for name, v := range map[string]string{
		"id": c.ID, "organization": c.Organization, "certificate": c.Certificate, "key": c.Key,
		"ca_certificate": c.CACertificate, "ca_key": c.CAKey, "store": c.Store,
	} {
		if v == "" {
			errs = append(errs, fmt.Errorf("configuration: %s is empty", name))
		}
	}
	if len(c.EKRoots) == 0 {
		errs = append(errs, errors.New("configuration: ek_roots is empty; no TPM could enrol"))
	}
	if _, err := c.lifetime(); err != nil {
		errs = append(errs, err)
	}
	if c.MassRefusalPercent < 0 || c.MassRefusalPercent > 100 {
		errs = append(errs, fmt.Errorf("configuration: mass_refusal_percent %d: want 0 to 100", c.MassRefusalPercent))
	}
	if c.ReportDays < 0 || c.ReportGiB < 0 || c.ReportDays > 36500 || c.ReportGiB > 1<<20 {
		errs = append(errs, fmt.Errorf("configuration: report_days %d, report_gib %d: want positive numbers, at most a century and a pebibyte", c.ReportDays, c.ReportGiB))
	}
	if len(c.PolicyKeys) == 0 && c.PolicyThreshold != 0 {
		errs = append(errs, errors.New("configuration: policy_threshold needs policy_keys"))
	}
	if (c.NetworkCACertificate == "") != (c.NetworkCAKey == "") {
		errs = append(errs, errors.New("configuration: network_ca_certificate and network_ca_key belong together"))
	}
	if c.Etcd != nil && len(c.Etcd.Endpoints) == 0 {
		errs = append(errs, errors.New("configuration: etcd without endpoints"))
	}
	return &c, errors.Join(errs...)
}

func (c *ServerConfig) lifetime() (time.Duration, error) {
	if c.CertificateLifetime == "" {
		return defaultLifetime, nil
	}
	d, err := time.ParseDuration(c.CertificateLifetime)
	if err != nil || d < verifier.MinLifetime || d > verifier.MaxLifetime {
		return 0, fmt.Errorf("configuration: certificate_lifetime %q: want %s to %s", c.CertificateLifetime, verifier.MinLifetime, verifier.MaxLifetime)
	}
	return d, nil
}

// EtcdConfig names an external etcd cluster. Beyond loopback it is reached by
// TLS, with a client certificate.
type EtcdConfig struct {
	Endpoints   []string `json:"endpoints"`   // such as https://192.0.2.1:2379
	CA          string   `json:"ca"`          // PEM file: whose server certificates
	Certificate string   `json:"certificate"` // PEM file: ours, as a client
	Key         string   `json:"key"`         // PEM file
}

// storeDir is the directory of the embedded member within the store.
const storeDir = "etcd"

// imagesDir is the directory of the releases' images within the store.
const imagesDir = "images"

// OpenStore opens the store that c names. The caller closes it.
func (c *ServerConfig) OpenStore(ctx context.Context, log *slog.Logger) (*store.Store, error) {
	to := store.Config{Dir: filepath.Join(c.Store, storeDir), Log: log}
	if c.Etcd != nil {
		to.Endpoints = c.Etcd.Endpoints
		if c.Etcd.CA != "" {
			t, err := c.Etcd.tls()
			if err != nil {
				return nil, fmt.Errorf("etcd: %w", err)
			}
			to.TLS = t
		}
	}
	return store.Open(ctx, to)
}

func (e *EtcdConfig) tls() (*tls.Config, error) {
	data, err := readFile(e.CA)
	if err != nil {
		return nil, err
	}
	t := cryptrec.Config()
	t.RootCAs = x509.NewCertPool()
	if !t.RootCAs.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s: no certificate in it", e.CA)
	}
	cert, err := tls.LoadX509KeyPair(e.Certificate, e.Key)
	if err != nil {
		return nil, err
	}
	t.Certificates = []tls.Certificate{cert}
	return t, nil
}

// Server is an open verifier.
type Server struct {
	*Service
	Certificate tls.Certificate // of the API
	closers     []func() error
}

// Close closes the service, its store and its archive.
func (x *Server) Close() error {
	var errs []error
	for _, f := range slices.Backward(x.closers) {
		errs = append(errs, f())
	}
	x.closers = nil
	return errors.Join(errs...)
}

// Open reads the files that c names and opens the store. The caller closes the
// server.
func (c *ServerConfig) Open(ctx context.Context, now func() time.Time, log *slog.Logger) (*Server, error) {
	fail := func(err error) (*Server, error) { return nil, fmt.Errorf("configuration: %w", err) }
	cert, err := tls.LoadX509KeyPair(c.Certificate, c.Key)
	if err != nil {
		return fail(err)
	}
	if err := cert.Leaf.VerifyHostname(c.ID); err != nil {
		return fail(fmt.Errorf("id %q: devices know the verifier by the name in its certificate: %w", c.ID, err))
	}
	ca, err := tls.LoadX509KeyPair(c.CACertificate, c.CAKey)
	if err != nil {
		return fail(err)
	}
	caKey, ok := ca.PrivateKey.(crypto.Signer)
	if !ok {
		return fail(fmt.Errorf("ca_key of type %T cannot sign", ca.PrivateKey))
	}
	lifetime, err := c.lifetime()
	if err != nil {
		return fail(err)
	}
	issuer, err := verifier.NewIssuer(ca.Leaf, caKey, c.Organization, lifetime)
	if err != nil {
		return fail(err)
	}
	roots := ek.NewRoots()
	for _, name := range c.EKRoots {
		if name == builtInRoots {
			built, err := ek.BuiltIn()
			if err != nil {
				return fail(fmt.Errorf("ek_roots: %s: %w", name, err))
			}
			roots.AddAll(built)
			continue
		}
		data, err := readFile(name)
		if err != nil {
			return fail(err)
		}
		if err := roots.AddPEM(data); err != nil {
			return fail(fmt.Errorf("ek_roots: %s: %w", name, err))
		}
	}
	var refs []attest.ReferenceValues
	for _, name := range c.ReferenceValues {
		data, err := readFile(name)
		if err != nil {
			return fail(err)
		}
		v, err := attest.ParseReferenceValues(data)
		if err != nil {
			return fail(fmt.Errorf("%s: %w", name, err))
		}
		refs = append(refs, *v)
	}
	var approvers *approval.Approvers
	if c.Approvers != "" {
		data, err := readFile(c.Approvers)
		if err != nil {
			return fail(err)
		}
		if approvers, err = approval.ParseApprovers(data, 2); err != nil {
			return fail(fmt.Errorf("%s: %w", c.Approvers, err))
		}
	}
	config := Config{Verifier: c.ID, Log: log, Issuer: issuer, EKRoots: roots, References: refs, Approvers: approvers, Now: now}
	config.Organization, config.Lifetime = c.Organization, lifetime
	config.Escrows, config.Images = c.Escrow, filepath.Join(c.Store, imagesDir)
	if config.NetworkIssuer, err = c.networkIssuer(ca.Leaf); err != nil {
		return fail(err)
	}
	if c.GatewayCA != "" {
		data, err := readFile(c.GatewayCA)
		if err != nil {
			return fail(err)
		}
		if config.Gateways = x509.NewCertPool(); !config.Gateways.AppendCertsFromPEM(data) {
			return fail(fmt.Errorf("gateway_ca: %s: no certificate in it", c.GatewayCA))
		}
	}
	if err := c.openAppraisal(&config); err != nil {
		if config.Reports != nil {
			err = errors.Join(err, config.Reports.Close())
		}
		return fail(err)
	}
	x := &Server{Certificate: cert}
	x.closers = append(x.closers, config.Reports.Close)
	if config.Audit, err = openAudit(ctx, c.inStore(c.LogKey, "log.key"), filepath.Join(c.Store, "log"), &config); err != nil {
		return fail(errors.Join(err, x.Close()))
	}
	x.closers = append(x.closers, config.Audit.Close)
	if config.Store, err = c.OpenStore(ctx, log); err != nil {
		return fail(errors.Join(err, x.Close()))
	}
	x.closers = append(x.closers, config.Store.Close)
	if x.Service, err = NewService(ctx, config); err != nil {
		return fail(errors.Join(err, x.Close()))
	}
	x.closers = append(x.closers, func() error { x.Service.Close(); return nil })
	return x, nil
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxConfig {
		return nil, fmt.Errorf("%s: over %d bytes", name, maxConfig)
	}
	return data, nil
}
