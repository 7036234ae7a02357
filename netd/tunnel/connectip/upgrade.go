// Package connectip is the tunnel driver for proxied IP in HTTP (CONNECT-IP,
// RFC 9484) over TLS 1.3 on TCP, by HTTP/1.1 upgrade: after the 101 response
// the bare TLS stream carries capsules (RFC 9297), so that many packets share
// a record. The gateway uses the same Stream.
//
// Signs of life: a client that has heard or said nothing for 3 s sends an
// ADDRESS_REQUEST capsule, which any conforming proxy must answer; an end that
// hears nothing for 9 s gives the connection up, as does one whose write is
// stuck for that long. A hung peer is found as surely as a dead path, which
// TCP keepalive could not do.
package connectip

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"

	"github.com/dunglas/httpsfv"

	"sekisho/netd/tunnel"
)

const (
	// Path is where a gateway offers all of IP: both variables of RFC 9484's
	// default template (section 3) are wildcards (section 4.6).
	Path = "/.well-known/masque/ip/*/*/"
	// Protocol is the upgrade token of RFC 9484, section 10.1.
	Protocol = "connect-ip"
	// innerHeader is our own response field, a dictionary (RFC 9651) with the
	// integer "mtu" and the inner list of strings "dns", for which RFC 9484 has
	// no capsule. A client without it uses DefaultMTU and no resolver.
	innerHeader = "Sekisho-Inner"
	// DefaultMTU of inner packets in bytes.
	DefaultMTU = 1400
	maxDNS     = 4
)

// setUpgrade adds the fields that ask for, or grant, the upgrade (RFC 9484,
// sections 4.3 and 4.4; RFC 9297, section 3.4).
func setUpgrade(h http.Header) {
	h.Set("Connection", "Upgrade")
	h.Set("Upgrade", Protocol)
	h.Set("Capsule-Protocol", "?1")
}

// Requested reports whether r asks for CONNECT-IP over HTTP/1.1 to everything,
// and why not.
func Requested(r *http.Request) error {
	switch {
	case r.Method != http.MethodGet, r.ProtoMajor != 1, r.ProtoMinor != 1:
		return fmt.Errorf("%s %s: want an upgrade by GET in HTTP/1.1", r.Method, r.Proto)
	case r.URL.Path != Path:
		return fmt.Errorf("path %q: want %s", r.URL.Path, Path)
	case !slices.Equal(r.Header.Values("Upgrade"), []string{Protocol}):
		return fmt.Errorf("upgrade to %q: want %s", r.Header.Values("Upgrade"), Protocol)
	case r.ContentLength != 0:
		return fmt.Errorf("request has a body")
	}
	return nil
}

// Granted returns the fields of the 101 response that grants an upgrade.
func Granted(a tunnel.Assignment) (http.Header, error) {
	h := http.Header{}
	setUpgrade(h)
	d, dns := httpsfv.NewDictionary(), httpsfv.InnerList{Params: httpsfv.NewParams()}
	for _, r := range a.DNS {
		dns.Items = append(dns.Items, httpsfv.NewItem(r.String()))
	}
	d.Add("mtu", httpsfv.NewItem(int64(a.MTU)))
	d.Add("dns", dns)
	v, err := httpsfv.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", innerHeader, err)
	}
	h.Set(innerHeader, v)
	return h, nil
}

// parseGranted checks a response to an upgrade and reads what it says of the
// inner network.
func parseGranted(r *http.Response) (tunnel.Assignment, error) {
	a := tunnel.Assignment{MTU: DefaultMTU}
	if r.StatusCode != http.StatusSwitchingProtocols {
		return a, &RefusedError{Status: r.StatusCode, RetryAfter: r.Header.Get("Retry-After")}
	}
	if got := r.Header.Values("Upgrade"); !slices.Equal(got, []string{Protocol}) {
		return a, fmt.Errorf("gateway upgraded to %q, want %s", got, Protocol)
	}
	capsules, err := httpsfv.UnmarshalItem(r.Header.Values("Capsule-Protocol"))
	if on, _ := capsules.Value.(bool); err != nil || !on {
		return a, fmt.Errorf("gateway's Capsule-Protocol is %q, want ?1", r.Header.Values("Capsule-Protocol"))
	}
	lines := r.Header.Values(innerHeader)
	if len(lines) == 0 {
		return a, nil
	}
	d, err := httpsfv.UnmarshalDictionary(lines)
	if err != nil {
		return a, fmt.Errorf("gateway's %s: %w", innerHeader, err)
	}
	if m, ok := d.Get("mtu"); ok {
		item, _ := m.(httpsfv.Item)
		mtu, ok := item.Value.(int64)
		if !ok || mtu < tunnel.MinMTU || mtu > tunnel.MaxMTU {
			return a, fmt.Errorf("gateway's inner mtu is %v, want %d to %d", item.Value, tunnel.MinMTU, tunnel.MaxMTU)
		}
		a.MTU = int(mtu)
	}
	if m, ok := d.Get("dns"); ok {
		list, _ := m.(httpsfv.InnerList)
		if len(list.Items) > maxDNS {
			return a, fmt.Errorf("gateway names %d resolvers, at most %d", len(list.Items), maxDNS)
		}
		for _, item := range list.Items {
			s, _ := item.Value.(string)
			r, err := netip.ParseAddr(s)
			if err != nil {
				return a, fmt.Errorf("gateway's resolver: %w", err)
			}
			a.DNS = append(a.DNS, r)
		}
	}
	return a, nil
}

// RefusedError is a gateway's answer other than 101.
type RefusedError struct {
	Status     int    // HTTP status
	RetryAfter string // as sent
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("gateway refused the session: http status %d %s", e.Status, http.StatusText(e.Status))
}
