"""What goes onto a link when: pure decisions, time is an argument. The shell that publishes lives elsewhere.

values          what goes in and comes out
link_estimator  how fast the link is and how long its way, from acknowledged deliveries
under_way       what has been sent and not acknowledged
link_queue      what stands on the link now
window          how much of class bulk may be under way
sender          which bytes next: the three policies
"""

from molink_stage_worker.transmission.link_estimator import LinkEstimator
from molink_stage_worker.transmission.sender import LinkSender
from molink_stage_worker.transmission.values import Parcel, Send, SenderReport, SenderSettings

__all__ = ["LinkEstimator", "LinkSender", "Parcel", "Send", "SenderReport", "SenderSettings"]
