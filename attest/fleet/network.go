package fleet

import (
	"cmp"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/verifier"
)

// Network certifies a laptop's network identity. A nil error proves: the device
// is enrolled, it asked with a credential of ours that is in force, and it has
// the key that the certificate is for.
func (s *Service) Network(ctx context.Context, req attest.NetworkRequest) (attest.NetworkCertificate, error) {
	var none attest.NetworkCertificate
	if s.NetworkIssuer == nil {
		return none, attest.Refuse(attest.ReasonRequestMalformed, "this verifier issues no network identities; set network_ca_certificate")
	}
	digest := attest.NetworkDigest(req.Request)
	device, err := s.signedBy(req.Chain, digest, req.Signature)
	if err != nil {
		return none, err
	}
	if err := s.Store.Read(ctx, func(t concurrency.STM) error {
		if t.Get(s.keys.device(device)) == "" {
			return attest.Refuse(attest.ReasonDeviceUnknown, "device %s is not enrolled here", device)
		}
		return nil
	}); err != nil {
		return none, err
	}
	der, err := s.NetworkIssuer.Issue(device, req.Request, s.Now())
	if err != nil {
		return none, attest.Refuse(attest.ReasonRequestMalformed, "%v", err)
	}
	s.Log.Info("network identity", "device", device)
	return attest.NetworkCertificate{Certificate: der}, nil
}

func (a *api) network(w http.ResponseWriter, r *http.Request) {
	var req attest.NetworkRequest
	if !a.decode(w, r, &req) {
		return
	}
	answer, err := a.service.Network(r.Context(), req)
	a.answer(w, r, "network identity", answer, err)
}

// defaultNetworkDays is how long a network identity lasts when the
// configuration does not say.
const defaultNetworkDays = 90

// networkIssuer returns nil where the organisation has no network CA. device is
// the CA of the credentials.
func (c *ServerConfig) networkIssuer(device *x509.Certificate) (*verifier.NetworkIssuer, error) {
	if c.NetworkCACertificate == "" {
		return nil, nil
	}
	ca, err := tls.LoadX509KeyPair(c.NetworkCACertificate, c.NetworkCAKey)
	if err != nil {
		return nil, fmt.Errorf("network_ca_certificate: %w", err)
	}
	key, ok := ca.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("network_ca_key of type %T cannot sign", ca.PrivateKey)
	}
	days := cmp.Or(c.NetworkDays, defaultNetworkDays)
	return verifier.NewNetworkIssuer(ca.Leaf, key, device, c.Organization, time.Duration(days)*24*time.Hour)
}
