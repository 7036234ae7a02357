//go:build linux

package host

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"sekisho/guestlink"
)

func TestAPI(t *testing.T) {
	var lines []string
	s := New(nil, 3, guestlink.DefaultPolicy(), []uint32{102}, func() uint64 { return 4 }, func(l string) { lines = append(lines, l) }, time.Now, slog.New(slog.DiscardHandler))
	call := func(method, path, body string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		s.handler().ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		return w
	}
	for body, want := range map[string]int{
		`{"address":"10.80.0.2/32","mtu":1400,"dns":[]}`: http.StatusNoContent,
		`{"address":"10.80.0.0/24","mtu":1400}`:          http.StatusBadRequest,
		`{"address":"10.80.0.2/32","mtu":1400} x`:        http.StatusBadRequest,
		`{`: http.StatusBadRequest,
		`{"address":"` + strings.Repeat("1", 5000) + `"}`: http.StatusRequestEntityTooLarge,
	} {
		if got := call("PUT", "/v1/config", body).Code; got != want {
			t.Errorf("PUT %.50s: %d, want %d", body, got, want)
		}
	}
	for body, want := range map[string]int{
		`{"action":"shutdown"}`: http.StatusConflict, // no guest
		`{"action":"reboot"}`:   http.StatusBadRequest, `{}`: http.StatusBadRequest, `{"force":true}`: http.StatusBadRequest,
	} {
		if got := call("POST", "/v1/power", body).Code; got != want {
			t.Errorf("POST %s: %d, want %d", body, got, want)
		}
	}
	var st Status
	if err := json.Unmarshal(call("GET", "/v1/status", "").Body.Bytes(), &st); err != nil {
		t.Fatal(err)
	}
	if st.State != "waiting" || st.Reason != "no-guest" || st.Config == nil || st.CID != 3 || st.Refused != 4 || st.Since.IsZero() {
		t.Errorf("%+v", st)
	}
	if strings.Join(lines, ",") != "waiting for the work domain / 業務領域の接続待ち" {
		t.Errorf("status lines %q", lines)
	}
}

func TestRestrict(t *testing.T) {
	ok := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	// A request whose peer is unknown is refused.
	w := httptest.NewRecorder()
	restrict(ok, []uint32{0, 102}).ServeHTTP(w, httptest.NewRequest("GET", "/v1/status", nil))
	if w.Code != http.StatusForbidden {
		t.Errorf("unknown peer: %d", w.Code)
	}
}
