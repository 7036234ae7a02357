//go:build linux

package wpa

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"sekisho/netd"
)

const (
	again     = time.Second     // after wpa_supplicant could not be reached
	pollEvery = 5 * time.Second // signal of the network that is joined
)

// wpa_supplicant's drivers (wpa_supplicant(8), -D).
const (
	driverWifi  = "nl80211"
	driverWired = "wired"
)

// missingPause is how often a link without what its network asks for is looked at again.
const missingPause = time.Minute

// missingError: there is nothing to tell wpa_supplicant about a link yet.
type missingError struct{ error }

func (e *missingError) Unwrap() error { return e.error }

// Facts is what a station knows about its link.
type Facts struct {
	Network string // joined: the SSID as text
	Signal  int    // dBm, 0 while unknown
	// AccessPoint is its hardware address; of a wired link, empty.
	AccessPoint string
	// Joined rises with every network that let us in.
	Joined int
	Reason string // netd.ReasonNoNetwork, WrongSecret, NoRadio or NoIdentity; empty when all is well
	Detail string
}

// Supplicant drives wpa_supplicant's control sockets. Make one with New.
type Supplicant struct {
	dir  string // with the socket "global" and one for each link
	log  *slog.Logger
	dial func(path string) (*Conn, error)

	mu       sync.Mutex
	identity *Identity
	networks []Network
	stations map[string]*station
}

// station is one link.
type station struct {
	change chan struct{} // the saved networks changed
	mu     sync.Mutex
	conn   *Conn // nil while wpa_supplicant is away
}

// New returns a Supplicant whose sockets are in dir.
func New(dir string, log *slog.Logger) *Supplicant {
	return &Supplicant{dir: dir, log: log, dial: Dial, stations: map[string]*station{}}
}

// SetIdentity replaces the laptop's network identity; nil: it has none.
func (s *Supplicant) SetIdentity(i *Identity) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.identity == i {
		return
	}
	s.identity = i
	s.wake()
}

// SetNetworks replaces the saved networks.
func (s *Supplicant) SetNetworks(list []Network) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.networks = slices.Clone(list)
	s.wake()
}

// wake has every station told its networks anew. s.mu is held.
func (s *Supplicant) wake() {
	for _, st := range s.stations {
		select {
		case st.change <- struct{}{}:
		default:
		}
	}
}

// Wifi keeps the link name joined to the best of the saved networks in reach,
// and reports, until ctx is done.
func (s *Supplicant) Wifi(ctx context.Context, name string, report func(Facts)) {
	s.follow(ctx, name, driverWifi, func() ([][]setting, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		all := [][]setting{} // also without any, the radio looks around
		var errs []error
		for _, n := range s.networks {
			set, err := n.settings(s.identity)
			if err != nil {
				errs = append(errs, fmt.Errorf("network %s: %w", n.SSID, err))
				continue
			}
			all = append(all, set)
		}
		return all, errors.Join(errs...)
	}, report)
}

// Wired answers a switch that asks for 802.1X on the link name, and reports,
// until ctx is done. server is the name in the authentication server's certificate.
func (s *Supplicant) Wired(ctx context.Context, name, server string, report func(Facts)) {
	s.follow(ctx, name, driverWired, func() ([][]setting, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		eap, err := s.identity.settings(server)
		if err != nil {
			return nil, err
		}
		return [][]setting{append([]setting{{"key_mgmt", "IEEE8021X"}, {"eapol_flags", "0"}}, eap...)}, nil
	}, report)
}

// follow connects again and again; wpa_supplicant may be restarted at any time.
func (s *Supplicant) follow(ctx context.Context, name, driver string, networks func() ([][]setting, error), report func(Facts)) {
	st := &station{change: make(chan struct{}, 1)}
	s.mu.Lock()
	s.stations[name] = st
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.stations, name)
		s.mu.Unlock()
	}()
	var facts Facts
	for ctx.Err() == nil {
		err := s.once(ctx, st, name, driver, networks, &facts, report)
		if ctx.Err() != nil {
			return
		}
		s.log.Debug("wpa_supplicant", "link", name, "err", err)
		var missing *missingError
		pause, reason := again, netd.ReasonNoRadio
		if errors.As(err, &missing) { // until a change, for there is nothing to say to anybody
			pause, reason = missingPause, netd.ReasonNoIdentity
		}
		facts = Facts{Joined: facts.Joined, Reason: reason, Detail: fmt.Sprintf("%s: %v", name, err)}
		report(facts)
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-st.change:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// once runs one connection to wpa_supplicant, until it breaks or ctx is done.
func (s *Supplicant) once(ctx context.Context, st *station, name, driver string, networks func() ([][]setting, error), facts *Facts, report func(Facts)) (err error) {
	if list, err := networks(); list == nil {
		return &missingError{err}
	}
	conn, err := s.attach(ctx, name, driver)
	if err != nil {
		return err
	}
	defer func() {
		st.mu.Lock()
		st.conn = nil
		st.mu.Unlock()
		conn.Close()
		var missing *missingError
		if ctx.Err() != nil || errors.As(err, &missing) { // the link is no longer ours to join
			s.remove(name)
		}
	}()
	st.mu.Lock()
	st.conn = conn
	st.mu.Unlock()
	if err := s.configure(ctx, conn, driver, networks); err != nil {
		return err
	}
	*facts = Facts{Joined: facts.Joined}
	s.look(ctx, conn, name, facts)
	report(*facts)
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e, ok := <-conn.Events():
			if !ok {
				return errors.New("wpa_supplicant has gone")
			}
			if !facts.event(name, e) {
				continue
			}
			if e.Name == "CTRL-EVENT-CONNECTED" {
				s.look(ctx, conn, name, facts)
				facts.Joined++
			}
			s.log.Info("network", "link", name, "event", e.Name, "network", facts.Network, "reason", facts.Reason)
		case <-st.change:
			if err := s.configure(ctx, conn, driver, networks); err != nil {
				return err
			}
			continue
		case <-tick.C:
			before := *facts
			if err := s.look(ctx, conn, name, facts); err != nil {
				return err
			}
			if before == *facts {
				continue
			}
		}
		report(*facts)
	}
}

// event takes over what an event says and reports whether it said anything.
func (f *Facts) event(name string, e Event) bool {
	switch e.Name {
	case "CTRL-EVENT-CONNECTED":
		f.Reason, f.Detail = "", ""
	case "CTRL-EVENT-DISCONNECTED":
		f.Network, f.Signal, f.AccessPoint = "", 0, ""
		if f.Reason == "" {
			f.Reason, f.Detail = netd.ReasonNoNetwork, name+" has left its network"
		}
	case "CTRL-EVENT-NETWORK-NOT-FOUND":
		if f.Reason == netd.ReasonWrongSecret {
			return false // the news that people need
		}
		f.Reason, f.Detail = netd.ReasonNoNetwork, "no saved Wi-Fi network is in reach of "+name
	case "CTRL-EVENT-SSID-TEMP-DISABLED":
		if ssid, ok := e.Args["ssid"]; ok && ssid == "" {
			return false // a cable: perhaps nobody asks there, and if EAP failed that was said
		}
		if r := e.Args["reason"]; r != "WRONG_KEY" && r != "AUTH_FAILED" {
			return false
		}
		f.Reason, f.Detail = netd.ReasonWrongSecret, "the network did not let "+name+" in"
	case "CTRL-EVENT-AUTH-REJECT":
		// WPA3: the access point refuses the confirmation of a wrong passphrase,
		// the second message of SAE (IEEE 802.11-2020, section 12.4.5).
		if e.Args["auth_type"] != "3" || e.Args["auth_transaction"] != "2" {
			return false
		}
		f.Reason, f.Detail = netd.ReasonWrongSecret, "the passphrase was not accepted on "+name
	case "CTRL-EVENT-EAP-FAILURE":
		if f.Reason == netd.ReasonWrongSecret {
			return false // it follows upon a more telling one
		}
		f.Reason, f.Detail = netd.ReasonWrongSecret, "the network refused the certificate of this laptop on "+name
	case "CTRL-EVENT-EAP-TLS-CERT-ERROR":
		f.Reason, f.Detail = netd.ReasonWrongSecret, "the network on "+name+" showed a certificate that is not the organisation's"
	default:
		return false
	}
	return true
}

// look asks what is joined, and how well it is heard.
func (s *Supplicant) look(ctx context.Context, conn *Conn, name string, f *Facts) error {
	text, err := conn.Request(ctx, "STATUS")
	if err != nil {
		return err
	}
	st := ParseStatus(text)
	if st["wpa_state"] != "COMPLETED" {
		f.Network, f.Signal, f.AccessPoint = "", 0, ""
		return nil
	}
	f.Reason, f.Detail = "", ""
	if ssid, err := unescape(st["ssid"]); err == nil && len(ssid) <= maxSSID {
		f.Network = SSID(ssid).String()
	}
	f.AccessPoint = ""
	if mac, err := net.ParseMAC(st["bssid"]); err == nil && f.Network != "" {
		f.AccessPoint = mac.String()
	}
	if text, err = conn.Request(ctx, "SIGNAL_POLL"); err == nil { // wired links have none
		if dbm, err := strconv.Atoi(ParseStatus(text)["RSSI"]); err == nil && dbm >= -200 && dbm < 0 {
			f.Signal = dbm
		}
	}
	return nil
}

// attach gives the link to wpa_supplicant, unless it has it already, and connects.
func (s *Supplicant) attach(ctx context.Context, name, driver string) (*Conn, error) {
	if !linkName(name) {
		return nil, fmt.Errorf("link name %q", name)
	}
	global, err := s.dial(filepath.Join(s.dir, "global"))
	if err != nil {
		return nil, err
	}
	defer global.Close()
	// One that another netd left knows networks that may have been forgotten.
	if _, err := global.Request(ctx, "INTERFACE_REMOVE", name); err != nil && !errors.Is(err, ErrRefused) {
		return nil, err
	}
	st, err := os.Stat(s.dir)
	if err != nil {
		return nil, fmt.Errorf("wpa_supplicant: %w", err)
	}
	control := fmt.Sprintf("DIR=%s GROUP=%d", s.dir, st.Sys().(*syscall.Stat_t).Gid)
	if _, err := global.Request(ctx, "INTERFACE_ADD "+strings.Join([]string{name, "", driver, control, "", ""}, "\t")); err != nil {
		return nil, err
	}
	conn, err := s.dial(filepath.Join(s.dir, name))
	if err != nil {
		return nil, err
	}
	if err := conn.Attach(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// remove takes the link away from wpa_supplicant.
func (s *Supplicant) remove(name string) {
	ctx, cancel := context.WithTimeout(context.Background(), answerTime)
	defer cancel()
	if global, err := s.dial(filepath.Join(s.dir, "global")); err == nil {
		global.Request(ctx, "INTERFACE_REMOVE", name)
		global.Close()
	}
}

// linkName reports whether name is a device's (dev_valid_name, net/core/dev.c)
// and can stand in a command.
func linkName(name string) bool {
	return name != "" && len(name) <= 15 && name != "." && name != ".." && !strings.ContainsAny(name, "/: \t\n\x00")
}

// configure replaces every network that wpa_supplicant knows on a link.
func (s *Supplicant) configure(ctx context.Context, conn *Conn, driver string, networks func() ([][]setting, error)) error {
	list, err := networks()
	if err != nil {
		s.log.Warn("networks that cannot be joined", "err", err) // the others are
	}
	if list == nil {
		return &missingError{err}
	}
	if _, err := conn.Request(ctx, "REMOVE_NETWORK all"); err != nil {
		return err
	}
	s.mu.Lock()
	blobs := s.identity.blobs()
	s.mu.Unlock()
	for _, b := range blobs {
		if _, err := conn.Request(ctx, "SET blob", b.name, b.value); err != nil {
			return err
		}
	}
	for _, set := range list {
		id, err := conn.Request(ctx, "ADD_NETWORK")
		if err != nil {
			return err
		}
		if _, err := strconv.ParseUint(id, 10, 16); err != nil {
			return fmt.Errorf("wpa_supplicant: network number %.20q", id)
		}
		for _, x := range set {
			if _, err := conn.Request(ctx, "SET_NETWORK", id, x.name, x.value); err != nil {
				return fmt.Errorf("%s: %w", x.name, err)
			}
		}
		if _, err := conn.Request(ctx, "ENABLE_NETWORK", id, "no-connect"); err != nil {
			return err
		}
	}
	if len(list) == 0 {
		return nil
	}
	// What was seen before holds no hidden network: only a new look around lets
	// the order decide, once all are known.
	if driver == driverWifi {
		if _, err := conn.Request(ctx, "BSS_FLUSH", "0"); err != nil {
			return err
		}
	}
	_, err = conn.Request(ctx, "REASSOCIATE")
	return err
}

// Scan asks every Wi-Fi link to look around and returns what was seen before;
// wpa_supplicant scans by itself while nothing is joined.
func (s *Supplicant) Scan(ctx context.Context) ([]Seen, error) {
	s.mu.Lock()
	stations := make([]*station, 0, len(s.stations))
	for _, st := range s.stations {
		stations = append(stations, st)
	}
	s.mu.Unlock()
	var list []Seen
	var errs []error
	for _, st := range stations {
		st.mu.Lock()
		conn := st.conn
		st.mu.Unlock()
		if conn == nil {
			continue
		}
		text, err := conn.Request(ctx, "SCAN_RESULTS")
		if err == nil {
			list = append(list, ParseScan(text)...)
			conn.Request(ctx, "SCAN") // for the next question; busy is no fault
		} else if !errors.Is(err, ErrRefused) { // a wired link scans nothing
			errs = append(errs, err)
		}
	}
	return list, errors.Join(errs...)
}
