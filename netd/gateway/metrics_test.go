package gateway

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// TestMetrics: what happened stands in the metrics, and no device's name.
func TestMetrics(t *testing.T) {
	s := newSite(t, nil, nil)
	c := s.open(s.device(1, time.Hour))
	c.expect(t, first(2))
	w := httptest.NewRecorder()
	s.server.MetricsHandler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	text := w.Body.String()
	for _, want := range []string{"sekisho_gateway_admissions_total 1\n", "sekisho_gateway_sessions 1\n", "sekisho_gateway_leases 1\n", "sekisho_gateway_revocations_heard 1\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	if id := s.server.Status().Sessions[0].Device.String(); strings.Contains(text, id) {
		t.Error("a device's id is in the metrics")
	}
}
