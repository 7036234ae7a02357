package lab

import (
	"bytes"
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"os"
	"path/filepath"

	"sekisho/attest"
	"sekisho/images/lab/hook"
)

// access.go is the organisation's networks with 802.1X: the CA of the laptops'
// network identities, an authentication server (hostapd's own), and a switch that
// asks it.

const (
	radiusName = "radius.sekisho.example"
	// CitySSID is the organisation's own Wi-Fi network.
	CitySSID = "city"
)

// accessPKI makes the CA of network identities and the authentication server's
// certificates on first use.
func (l *Lab) accessPKI() error {
	if exist(l.lab("pki", "radius.pem")) {
		return nil
	}
	ca := func(name, cn string) (authority, error) {
		return l.issue(name, nil, &x509.Certificate{
			Subject: pkix.Name{Organization: []string{labOrganization}, CommonName: cn},
			IsCA:    true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign})
	}
	if _, err := ca("network-ca", "Sekisho Lab network CA"); err != nil {
		return err
	}
	servers, err := ca("radius-ca", "Sekisho Lab authentication servers CA")
	if err != nil {
		return err
	}
	_, err = l.issue("radius", &servers, &x509.Certificate{
		Subject: pkix.Name{CommonName: radiusName}, DNSNames: []string{radiusName},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return err
}

// networkAccess is the organisation's part about it.
func (l *Lab) networkAccess() (*attest.NetworkAccess, error) {
	ca, err := os.ReadFile(l.lab("pki", "radius-ca.pem"))
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	return &attest.NetworkAccess{Server: radiusName, CA: string(ca), Wired: true, SSIDs: []string{CitySSID}}, nil
}

// authenticator is hostapd's configuration of an authentication server that
// lets in whom the network CA certified, with its files in dir.
func (l *Lab) authenticator(dir string) (conf string, files map[string]string, err error) {
	files = map[string]string{"users": "* TLS\n"}
	for _, name := range []string{"network-ca.pem", "radius.pem", "radius.key"} {
		data, err := os.ReadFile(l.lab("pki", name))
		if err != nil {
			return "", nil, fmt.Errorf("lab: %w", err)
		}
		files[name] = string(data)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	return fmt.Sprintf("ieee8021x=1\neap_server=1\neap_user_file=%s\nca_cert=%s\nserver_cert=%s\nprivate_key=%s\n",
		in("users"), in("network-ca.pem"), in("radius.pem"), in("radius.key")), files, nil
}

// Enterprise is an access point of the organisation's network for the radio of
// a number: WPA2-Enterprise, EAP-TLS.
func (l *Lab) Enterprise(number int) (hook.Air, error) {
	conf, files, err := l.authenticator(hook.AirDir(number))
	return hook.Air{Conf: accessPoint(CitySSID) + "wpa=2\nwpa_key_mgmt=WPA-EAP\nrsn_pairwise=CCMP\nieee80211w=1\n" + conf, Files: files}, err
}

// portShut keeps the laptop from the home's DHCP server, as a switch's port does
// that nobody has opened.
const portShut = "table inet port { chain in { type filter hook input priority 0; iifname uplink udp dport 67 drop; }; }"

// GuardPort makes the cable's far end a switch that asks for 802.1X. The port
// is shut until OpenPort.
func (l *Lab) GuardPort(ctx context.Context) error {
	dir := l.lab("switch")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	conf, files, err := l.authenticator(dir)
	if err != nil {
		return err
	}
	files["hostapd.conf"] = "interface=uplink\ndriver=wired\nuse_pae_group_addr=1\neap_reauth_period=0\n" + conf
	for name, text := range files {
		if err := writeFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	if err := command(ctx, portShut, "ip", "netns", "exec", "sekisho-home", "nft", "-f", "-"); err != nil {
		return err
	}
	if err := os.RemoveAll(l.lab("switch.log")); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	_, err = l.start(spec{name: "switch", namespace: "sekisho-home", argv: []string{"hostapd", filepath.Join(dir, "hostapd.conf")}})
	return err
}

// PortAuthenticated reports whether the switch has let the laptop in.
func (l *Lab) PortAuthenticated() (bool, error) {
	log, err := os.ReadFile(l.lab("switch.log"))
	if err != nil {
		return false, fmt.Errorf("lab: %w", err)
	}
	return bytes.Contains(log, []byte("CTRL-EVENT-EAP-SUCCESS")), nil
}

// OpenPort opens the port.
func (l *Lab) OpenPort(ctx context.Context) error {
	return command(ctx, "delete table inet port", "ip", "netns", "exec", "sekisho-home", "nft", "-f", "-")
}
