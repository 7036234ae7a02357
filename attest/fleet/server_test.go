package fleet

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"sekisho/attest"
)

// TestRoutes shows that nothing but the routes answers, that admin routes
// are not among them, and that large bodies are cut.
func TestRoutes(t *testing.T) {
	b := newBench(t)
	h := Handler(b.service, slog.New(slog.DiscardHandler))
	do := func(method, path string, body []byte) int {
		r := httptest.NewRequest(method, path, bytes.NewReader(body))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		b.now = b.now.Add(time.Second) // the limit by address is another test
		return w.Code
	}
	for _, path := range []string{"/", "/v1", "/v1/devices", AdminTickets, AdminDevices, AdminResults, AdminReferences, "/debug/pprof/"} {
		for _, method := range []string{"GET", "POST", "DELETE", "PUT"} {
			if code := do(method, path, nil); code != http.StatusNotFound {
				t.Errorf("%s %s: %d", method, path, code)
			}
		}
	}
	for _, path := range []string{attest.PathEnrolBegin, attest.PathEnrolFinish, attest.PathChallenge, attest.PathAttest} {
		if code := do("GET", path, nil); code != http.StatusMethodNotAllowed {
			t.Errorf("GET %s: %d", path, code)
		}
	}
	for path, body := range map[string]string{
		attest.PathEnrolBegin:  `{"ticket":"` + string(bytes.Repeat([]byte("a"), attest.MaxMessage)) + `"}`,
		attest.PathEnrolFinish: `{"unknown":1}`,
		attest.PathChallenge:   `{"device_id":"zz"}`,
	} {
		if code := do("POST", path, []byte(body)); code != http.StatusBadRequest {
			t.Errorf("POST %s: %d", path, code)
		}
	}
	if code := do("POST", attest.PathEnrolBegin, []byte(`{"ticket":"x"}`)); code != http.StatusForbidden {
		t.Errorf("enrolment without right: %d", code)
	}
	if code := do("POST", attest.PathAttest, []byte("rubbish")); code != http.StatusOK {
		t.Errorf("malformed evidence is a result: %d", code)
	}
}

func TestRateLimit(t *testing.T) {
	b := newBench(t)
	h := Handler(b.service, slog.New(slog.DiscardHandler))
	ask := func(from string) int {
		r := httptest.NewRequest("POST", attest.PathEnrolFinish, bytes.NewReader([]byte(`{"unknown":1}`)))
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code
	}
	for i := range rateBurst {
		if code := ask("192.0.2.1:1"); code != http.StatusBadRequest {
			t.Fatalf("request %d: %d", i, code)
		}
	}
	if code := ask("192.0.2.1:2"); code != http.StatusTooManyRequests {
		t.Errorf("one too many: %d", code)
	}
	if code := ask("192.0.2.2:1"); code != http.StatusBadRequest {
		t.Errorf("another address: %d", code)
	}
	b.now = b.now.Add(time.Second)
	if code := ask("192.0.2.1:3"); code != http.StatusBadRequest {
		t.Errorf("a second later: %d", code)
	}
}

func FuzzParseServerConfig(f *testing.F) {
	f.Add([]byte(`{"listen":"a","certificate_lifetime":"10m"}`))
	f.Fuzz(func(t *testing.T, data []byte) { ParseServerConfig(data) })
}

func TestAdmin(t *testing.T) {
	b := newBench(t)
	h := AdminHandler(b.service, slog.New(slog.DiscardHandler))
	do := func(method, path string, body any, answer any) int {
		data, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, bytes.NewReader(data)))
		if w.Code == http.StatusOK {
			if err := json.Unmarshal(w.Body.Bytes(), answer); err != nil {
				t.Errorf("%s %s: %v", method, path, err)
			}
		}
		return w.Code
	}
	var ticket TicketResponse
	if code := do("POST", AdminTickets, TicketRequest{1, 60}, &ticket); code != http.StatusOK {
		t.Fatalf("ticket: %d", code)
	}
	if code := do("POST", AdminTickets, TicketRequest{0, 60}, &ticket); code != http.StatusBadRequest {
		t.Errorf("ticket of no use: %d", code)
	}
	e, err := b.enrol(b.device(), ticket.Ticket, nil)
	if err != nil {
		t.Fatal(err)
	}
	var list []Device
	if do("GET", AdminDevices, nil, &list); len(list) != 1 || list[0].ID != e.Device {
		t.Errorf("devices: %+v", list)
	}
	var d Device
	if code := do("GET", AdminDevices+"/"+e.Device.String(), nil, &d); code != http.StatusOK || d.ID != e.Device {
		t.Errorf("device: %d, %+v", code, d)
	}
	if code := do("GET", AdminDevices+"/"+attest.Digest{}.String(), nil, &d); code != http.StatusNotFound {
		t.Errorf("unknown device: %d", code)
	}
	var refs []Reference
	var ref Reference
	if code := do("POST", AdminReferences, image.Reference("sekisho", "2"), &ref); code != http.StatusOK || ref.ID != "sekisho 2" {
		t.Errorf("reference: %d, %+v", code, ref)
	}
	if code := do("POST", AdminReferences, map[string]string{"image": "x"}, &ref); code != http.StatusBadRequest {
		t.Errorf("reference without values: %d", code)
	}
	if do("GET", AdminReferences, nil, &refs); len(refs) != 2 {
		t.Errorf("references: %+v", refs)
	}
	var none struct{}
	if code := do("DELETE", AdminReferences+"?id=sekisho+2", nil, &none); code != http.StatusOK {
		t.Errorf("remove: %d", code)
	}
	if code := do("DELETE", AdminReferences+"?id=sekisho+2", nil, &none); code != http.StatusNotFound {
		t.Errorf("remove again: %d", code)
	}
}

// TestLimitByNetwork: one IPv6 host has as many addresses as it likes and is
// one to the limit; IPv4 addresses each count by themselves.
func TestLimitByNetwork(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"2001:db8::1", "2001:db8::ffff:2", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
		{"192.0.2.1", "192.0.2.2", false},
		{"::ffff:192.0.2.1", "192.0.2.1", true},
	} {
		if same := network(netip.MustParseAddr(c.a)) == network(netip.MustParseAddr(c.b)); same != c.same {
			t.Errorf("%s and %s: one network %v", c.a, c.b, same)
		}
	}
}
