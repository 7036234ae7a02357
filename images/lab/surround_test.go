package lab

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/netd/office"
	"sekisho/netd/path"
)

// TestOfficeCertificates: what the lab makes is what a beacon and a laptop take.
func TestOfficeCertificates(t *testing.T) {
	l := &Lab{Root: t.TempDir(), Log: io.Discard}
	if err := l.preparePKI(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(l.OrganizationFile())
	if err != nil {
		t.Fatal(err)
	}
	o, err := attest.ParseOrganization(data)
	if err != nil || o.Office == nil || o.Office.Beacons[0].Address != beaconAddress {
		t.Fatalf("organization: %+v, %v", o, err)
	}
	config, err := json.Marshal(l.beaconConfig())
	if err != nil {
		t.Fatal(err)
	}
	c, err := office.ParseBeaconConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := office.NewBeacon(c, nil, slog.New(slog.DiscardHandler)); err != nil {
		t.Error(err)
	}
}

// TestPortalIsForeign: the hotel's page is told from the organisation's servers.
func TestPortalIsForeign(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ServePortal(ctx, address) }()
	var r path.Result
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline) && r.Answer == path.Silent; {
		r = path.Prober{Roots: x509.NewCertPool()}.Ask(t.Context(), attest.Endpoint{Address: netip.MustParseAddrPort(address), ServerName: verifierName}, true)
	}
	if r.Answer != path.Foreign {
		t.Errorf("the portal is %s: %s", r.Answer, r.What)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
