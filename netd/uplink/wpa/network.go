//go:build linux

package wpa

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"unicode"
	"unicode/utf8"
)

// Security is how a network protects itself.
type Security string

// The ways. What is older than WPA2 is not spoken.
const (
	Open       Security = "open"       // none, or opportunistic encryption (OWE)
	Personal   Security = "personal"   // WPA2 or WPA3 with a passphrase
	Enterprise Security = "enterprise" // 802.1X, EAP-TLS with the laptop's network identity
)

// Secret is a passphrase. It does not show itself.
type Secret string

func (Secret) String() string       { return "[secret]" }
func (Secret) LogValue() slog.Value { return slog.StringValue("[secret]") }

// MarshalJSON implements json.Marshaler. A Store writes secrets by Reveal.
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"[secret]"`), nil }

// Reveal returns the passphrase itself.
func (s Secret) Reveal() string { return string(s) }

// SSID is a network's name, 1 to 32 bytes of any kind.
type SSID []byte

// String shows it as text if it is UTF-8 that can be printed, else in
// hexadecimal: whoever is in reach chooses the names that a terminal shows.
func (s SSID) String() string {
	if utf8.Valid(s) && !bytes.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return string(s)
	}
	return hex.EncodeToString(s)
}

// Network is a saved Wi-Fi network.
type Network struct {
	SSID       SSID     `json:"ssid"` // base64
	Security   Security `json:"security"`
	Passphrase Secret   `json:"passphrase,omitempty"`
	Hidden     bool     `json:"hidden,omitempty"` // it does not announce its name
	Priority   int      `json:"priority"`         // the higher is joined first, 0 to 100
	// Server is the name that an Enterprise network's server must have in its
	// certificate.
	Server string `json:"server,omitempty"`
}

func (n Network) equal(o Network) bool {
	return bytes.Equal(n.SSID, o.SSID) && n.Security == o.Security && n.Passphrase == o.Passphrase && n.Hidden == o.Hidden && n.Priority == o.Priority && n.Server == o.Server
}

// Validate reports whether n can be joined.
func (n Network) Validate() error {
	var errs []error
	fail := func(format string, a ...any) { errs = append(errs, fmt.Errorf("wi-fi network: "+format, a...)) }
	if len(n.SSID) == 0 || len(n.SSID) > maxSSID {
		fail("name of %d bytes, want 1 to %d", len(n.SSID), maxSSID)
	}
	switch n.Security {
	case Open, Enterprise:
		if n.Passphrase != "" {
			fail("%s network with a passphrase", n.Security)
		}
	case Personal: // IEEE 802.11-2020, annex J.4.1
		if len(n.Passphrase) < 8 || len(n.Passphrase) > 63 {
			fail("passphrase of %d characters, want 8 to 63", len(n.Passphrase))
		}
		for _, b := range []byte(n.Passphrase) {
			if b < 0x20 || b > 0x7e {
				fail("passphrase with a character that is not printable ASCII")
				break
			}
		}
	default:
		fail("security %q, want open, personal or enterprise", n.Security)
	}
	if n.Security == Enterprise && !hostName(n.Server) {
		fail("enterprise network without the name of its server")
	}
	if n.Priority < 0 || n.Priority > 100 {
		fail("priority %d, want 0 to 100", n.Priority)
	}
	return errors.Join(errs...)
}

// hostName reports whether s can stand in a certificate as a DNS name; it goes
// into a command in quotes.
func hostName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for _, b := range []byte(s) {
		if (b < 'a' || b > 'z') && (b < '0' || b > '9') && b != '.' && b != '-' {
			return false
		}
	}
	return true
}

// setting is one SET_NETWORK.
type setting struct{ name, value string }

// settings are those of a Wi-Fi network (wpa_supplicant.conf(5)).
func (n Network) settings(identity *Identity) ([]setting, error) {
	if err := n.Validate(); err != nil {
		return nil, err
	}
	// A station that hears its access point badly looks for another of the same
	// name each 30 s, and each 5 minutes else (wpa_supplicant.conf(5), bgscan).
	s := []setting{{"ssid", hex.EncodeToString(n.SSID)}, {"priority", strconv.Itoa(n.Priority)}, {"bgscan", quoted("simple:30:-65:300")}}
	if n.Hidden {
		s = append(s, setting{"scan_ssid", "1"})
	}
	switch n.Security {
	case Open:
		return append(s, setting{"key_mgmt", "NONE OWE"}), nil
	case Personal:
		return append(append(s, rsn("WPA-PSK WPA-PSK-SHA256 SAE")...), setting{"psk", quoted(n.Passphrase.Reveal())}), nil
	}
	eap, err := identity.settings(n.Server)
	if err != nil {
		return nil, err
	}
	return append(append(s, rsn("WPA-EAP WPA-EAP-SHA256")...), eap...), nil
}

// rsn are the settings of every protected network: WPA2 or newer, AES only,
// management frames protected where the network can.
func rsn(keys string) []setting {
	return []setting{{"key_mgmt", keys}, {"proto", "RSN"}, {"pairwise", "CCMP GCMP GCMP-256 CCMP-256"}, {"ieee80211w", "1"}}
}

func quoted(s string) string { return `"` + s + `"` }

// Identity is the laptop's network identity: who it is to an 802.1X network,
// before the verifier has been reached and before any disk is unlocked.
type Identity struct {
	Name        string // user name in the outer EAP identity
	Certificate []byte // DER
	Key         []byte // DER (SEC 1)
	CA          []byte // DER, root of the authentication servers
}

// settings for EAP-TLS (RFC 5216, RFC 9190) with the server's name checked.
func (i *Identity) settings(server string) ([]setting, error) {
	switch {
	case i == nil:
		return nil, errors.New("no network identity on this laptop")
	case !hostName(server):
		return nil, fmt.Errorf("server name %q of an 802.1X network", server)
	case !hostName(i.Name):
		return nil, fmt.Errorf("network identity %q", i.Name)
	}
	return []setting{
		{"eap", "TLS"}, {"identity", quoted(i.Name)}, {"domain_match", quoted(server)},
		{"ca_cert", quoted("blob://ca")}, {"client_cert", quoted("blob://certificate")}, {"private_key", quoted("blob://key")},
		{"phase1", quoted("tls_disable_tlsv1_0=1 tls_disable_tlsv1_1=1 tls_disable_tlsv1_3=0")},
	}, nil
}

// blobs are the identity's parts as wpa_supplicant keeps them, in memory.
func (i *Identity) blobs() []setting {
	if i == nil {
		return nil
	}
	return []setting{{"ca", hex.EncodeToString(i.CA)}, {"certificate", hex.EncodeToString(i.Certificate)}, {"key", hex.EncodeToString(i.Key)}}
}

// Revealed is a network with its passphrase in the clear, as it is stored and
// as whoever joins it sends it.
type Revealed struct {
	Network
	Passphrase string `json:"passphrase,omitempty"`
}

// Hide returns the network, its passphrase hidden.
func (r Revealed) Hide() Network {
	n := r.Network
	n.Passphrase = Secret(r.Passphrase)
	return n
}

// maxSaved bounds the list of saved networks.
const maxSaved = 64

// MaxEncoded bounds Encode's result in bytes.
const MaxEncoded = 16 << 10

// Encode returns the networks for a Store, secrets in the clear.
func Encode(list []Network) ([]byte, error) {
	if len(list) > maxSaved {
		return nil, fmt.Errorf("wi-fi: %d saved networks, at most %d", len(list), maxSaved)
	}
	out := make([]Revealed, len(list))
	for i, n := range list {
		out[i] = Revealed{n, n.Passphrase.Reveal()}
	}
	b, err := json.Marshal(out)
	if err == nil && len(b) > MaxEncoded {
		err = fmt.Errorf("wi-fi: saved networks take %d bytes, at most %d", len(b), MaxEncoded)
	}
	return b, err
}

// Decode is the inverse of Encode. Networks that are not valid are an error.
func Decode(b []byte) ([]Network, error) {
	if len(b) > MaxEncoded {
		return nil, fmt.Errorf("wi-fi: saved networks of %d bytes, at most %d", len(b), MaxEncoded)
	}
	var in []Revealed
	if err := json.Unmarshal(b, &in); err != nil {
		return nil, fmt.Errorf("wi-fi: saved networks: %w", err)
	}
	if len(in) > maxSaved {
		return nil, fmt.Errorf("wi-fi: %d saved networks, at most %d", len(in), maxSaved)
	}
	list := make([]Network, len(in))
	for i, s := range in {
		list[i] = s.Hide()
		if err := list[i].Validate(); err != nil {
			return nil, err
		}
	}
	return list, nil
}
