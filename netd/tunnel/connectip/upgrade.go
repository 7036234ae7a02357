// Package connectip is the tunnel driver for proxied IP in HTTP (CONNECT-IP,
// RFC 9484), over two carriages: TLS 1.3 on TCP by HTTP/1.1 upgrade, where after
// the 101 response the bare TLS stream carries capsules (RFC 9297), so that
// many packets share a record; and HTTP/3 on UDP, where each packet is a
// datagram. The gateway uses the same Stream.
//
// Between two ends of ours, TLS also carries trains (tunnel.Frame): what
// segmentation offload makes of a TCP flow goes as one capsule of up to 64 KiB,
// and nobody on the way cuts it up, sums it or puts it together again.
//
// Signs of life: a client that has heard nothing for 1 s (10 s while nobody
// uses the tunnel) sends an ADDRESS_REQUEST capsule, which any conforming proxy
// must answer. Unanswered for 1.25 s it makes the path suspect, which is netd's
// reason to open another session; for 9 s, it ends this one. A hung peer is
// found as surely as a dead path, which TCP keepalive could not do.
package connectip

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"

	"github.com/dunglas/httpsfv"
	"github.com/quic-go/quic-go/http3"

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
	// no capsule. A client without it uses DefaultMTU and no resolver. Either
	// end says in it, a client in its request, that it understands trains.
	innerHeader     = "Sekisho-Inner"
	trainsParameter = "trains"
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

// request returns a client's request, for the carriage to complete.
func request(to tunnel.Target) *http.Request {
	return &http.Request{
		Method: http.MethodGet, URL: &url.URL{Scheme: "https", Host: to.Gateway.ServerName, Path: Path}, Host: to.Gateway.ServerName,
		ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{"User-Agent": nil, innerHeader: {trainsParameter}},
	}
}

// Requested reports whether r asks for CONNECT-IP to everything, by HTTP/1.1
// upgrade or HTTP/3 extended CONNECT, and why not.
func Requested(r *http.Request) error {
	switch r.ProtoMajor {
	case 1:
		if r.Method != http.MethodGet || r.ProtoMinor != 1 {
			return fmt.Errorf("%s %s: want an upgrade by GET in HTTP/1.1", r.Method, r.Proto)
		}
		if !slices.Equal(r.Header.Values("Upgrade"), []string{Protocol}) {
			return fmt.Errorf("upgrade to %q: want %s", r.Header.Values("Upgrade"), Protocol)
		}
		if r.ContentLength != 0 {
			return errors.New("request has a body")
		}
	default:
		// http3 puts the :protocol of an extended CONNECT into Proto (RFC 9220).
		if r.Method != http.MethodConnect || r.Proto != Protocol {
			return fmt.Errorf("%s %s: want an extended CONNECT for %s", r.Method, r.Proto, Protocol)
		}
		if err := capsules(r.Header); err != nil {
			return err
		}
	}
	if r.URL.Path != Path {
		return fmt.Errorf("path %q: want %s", r.URL.Path, Path)
	}
	return nil
}

// capsules reports whether h says that capsules follow (RFC 9297, section 3.4).
func capsules(h http.Header) error {
	v, err := httpsfv.UnmarshalItem(h.Values(http3.CapsuleProtocolHeader))
	if on, _ := v.Value.(bool); err != nil || !on {
		return fmt.Errorf("Capsule-Protocol is %q, want ?1", h.Values(http3.CapsuleProtocolHeader))
	}
	return nil
}

// TakesTrains reports whether the client that sent r understands trains.
func TakesTrains(r *http.Request) bool {
	d, err := httpsfv.UnmarshalDictionary(r.Header.Values(innerHeader))
	return err == nil && takesTrains(d)
}

func takesTrains(d *httpsfv.Dictionary) bool {
	m, _ := d.Get(trainsParameter)
	item, _ := m.(httpsfv.Item)
	on, _ := item.Value.(bool)
	return on
}

// Granted adds the fields of the response that grants a request in the given
// major version of HTTP.
func Granted(h http.Header, major int, a tunnel.Assignment) error {
	if major == 1 {
		setUpgrade(h)
	} else {
		h.Set(http3.CapsuleProtocolHeader, "?1")
	}
	d, dns := httpsfv.NewDictionary(), httpsfv.InnerList{Params: httpsfv.NewParams()}
	for _, r := range a.DNS {
		dns.Items = append(dns.Items, httpsfv.NewItem(r.String()))
	}
	d.Add("mtu", httpsfv.NewItem(int64(a.MTU)))
	d.Add("dns", dns)
	d.Add(trainsParameter, httpsfv.NewItem(true))
	v, err := httpsfv.Marshal(d)
	if err != nil {
		return fmt.Errorf("%s: %w", innerHeader, err)
	}
	h.Set(innerHeader, v)
	return nil
}

// parseGranted checks a response and reads what it says of the inner network,
// and whether the gateway understands trains.
func parseGranted(r *http.Response) (a tunnel.Assignment, trains bool, err error) {
	a.MTU = DefaultMTU
	if r.ProtoMajor == 1 {
		if r.StatusCode != http.StatusSwitchingProtocols {
			return a, false, &RefusedError{Status: r.StatusCode, RetryAfter: r.Header.Get("Retry-After")}
		}
		if got := r.Header.Values("Upgrade"); !slices.Equal(got, []string{Protocol}) {
			return a, false, fmt.Errorf("gateway upgraded to %q, want %s", got, Protocol)
		}
	} else if r.StatusCode/100 != 2 {
		return a, false, &RefusedError{Status: r.StatusCode, RetryAfter: r.Header.Get("Retry-After")}
	}
	if err := capsules(r.Header); err != nil {
		return a, false, fmt.Errorf("gateway's %w", err)
	}
	lines := r.Header.Values(innerHeader)
	if len(lines) == 0 {
		return a, false, nil
	}
	d, err := httpsfv.UnmarshalDictionary(lines)
	if err != nil {
		return a, false, fmt.Errorf("gateway's %s: %w", innerHeader, err)
	}
	trains = takesTrains(d)
	if m, ok := d.Get("mtu"); ok {
		item, _ := m.(httpsfv.Item)
		mtu, ok := item.Value.(int64)
		if !ok || mtu < tunnel.MinMTU || mtu > tunnel.MaxMTU {
			return a, false, fmt.Errorf("gateway's inner mtu is %v, want %d to %d", item.Value, tunnel.MinMTU, tunnel.MaxMTU)
		}
		a.MTU = int(mtu)
	}
	if m, ok := d.Get("dns"); ok {
		list, _ := m.(httpsfv.InnerList)
		if len(list.Items) > maxDNS {
			return a, false, fmt.Errorf("gateway names %d resolvers, at most %d", len(list.Items), maxDNS)
		}
		for _, item := range list.Items {
			s, _ := item.Value.(string)
			r, err := netip.ParseAddr(s)
			if err != nil {
				return a, false, fmt.Errorf("gateway's resolver: %w", err)
			}
			a.DNS = append(a.DNS, r)
		}
	}
	return a, trains, nil
}

// RefusedError is a gateway's answer other than 101.
type RefusedError struct {
	Status     int    // HTTP status
	RetryAfter string // as sent
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("gateway refused the session: http status %d %s", e.Status, http.StatusText(e.Status))
}
